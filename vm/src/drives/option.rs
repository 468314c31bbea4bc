//! Block options in any spelling (`a.b=c` lists, JSON objects, `file=json:{…}`) as one tree of
//! dotted keys.

use crate::launch::arguments::{KeyList, QemuOption};
use crate::launch::form;
use serde_json::{Map, Value};

/// What becomes of one member of a block option.
pub(super) enum Edit {
    Keep,
    Drop,
    Set(String),
}

/// Whether the option makes a drive or a block node.
pub(super) fn is_block(option: &QemuOption) -> bool {
    matches!(option.name.as_str(), "drive" | "blockdev")
}

/// Every scalar under its dotted key. Booleans are `on` and `off`, as in lists.
pub(super) fn scalars(option: &QemuOption) -> Vec<(String, String)> {
    let mut found = Vec::new();
    rewrite(option, &mut |key, value| {
        found.extend(value.map(|value| (key.to_owned(), value.to_owned())));
        Edit::Keep
    });
    found
}

/// The last value of a key, as QEMU takes it.
pub(super) fn get(option: &QemuOption, key: &str) -> Option<String> {
    scalars(option).into_iter().rev().find(|(name, _)| name == key).map(|(_, value)| value)
}

/// Whether the option itself says that its disk is only read.
pub(super) fn is_read_only(option: &QemuOption) -> bool {
    let has = |key: &str| get(option, key).is_some_and(|value| form::is_on(&value));
    has("read-only")
        || has("readonly")
        || option.name == "drive" && get(option, "media").as_deref() == Some("cdrom")
}

/// The names of all nodes that the option makes, its own first.
pub(super) fn node_names(option: &QemuOption) -> Vec<String> {
    let mut names: Vec<(String, String)> =
        scalars(option).into_iter().filter(|(key, _)| last(key) == "node-name").collect();
    names.sort_by_key(|(key, _)| key.len());
    names.into_iter().map(|(_, name)| name).collect()
}

/// Whether nothing is in the group of this key.
pub(super) fn is_nothing(option: &QemuOption, key: &str) -> bool {
    let inner = format!("{key}.");
    !scalars(option).iter().any(|(name, _)| name.starts_with(&inner))
}

/// The last part of a dotted key.
pub(super) fn last(key: &str) -> &str {
    key.rsplit('.').next().unwrap_or(key)
}

/// Asks `edit` about each member, a group (without a value) before what is in it.
pub(super) fn rewrite(
    option: &QemuOption,
    edit: &mut dyn FnMut(&str, Option<&str>) -> Edit,
) -> QemuOption {
    if option.value().starts_with('{')
        && let Ok(Value::Object(members)) = serde_json::from_str(option.value())
    {
        return QemuOption::with(
            &option.name,
            Value::Object(members_of(members, "", edit)).to_string(),
        );
    }
    let mut keys = KeyList::default();
    for (number, (key, value)) in option.keys().iter().enumerate() {
        // The first word of -blockdev may be the driver.
        let name = key.or((number == 0 && option.name == "blockdev").then_some("driver"));
        if let Some(value) = list_value(name.unwrap_or_default(), value, edit) {
            keys.push(key, value);
        }
    }
    QemuOption::with(&option.name, keys.to_string())
}

fn list_value(
    key: &str,
    value: &str,
    edit: &mut dyn FnMut(&str, Option<&str>) -> Edit,
) -> Option<String> {
    if let Some(text) = value.strip_prefix("json:").filter(|_| key == "file")
        && let Ok(Value::Object(members)) = serde_json::from_str(text)
    {
        return Some(format!("json:{}", Value::Object(members_of(members, "", edit))));
    }
    match edit(key, Some(value)) {
        Edit::Keep => Some(value.to_owned()),
        Edit::Drop => None,
        Edit::Set(new) => Some(new),
    }
}

fn members_of(
    members: Map<String, Value>,
    above: &str,
    edit: &mut dyn FnMut(&str, Option<&str>) -> Edit,
) -> Map<String, Value> {
    let mut kept = Map::new();
    for (name, value) in members {
        let key = if above.is_empty() { name.clone() } else { format!("{above}.{name}") };
        let text = match &value {
            Value::Bool(on) => Some(if *on { "on" } else { "off" }.to_owned()),
            Value::String(text) => Some(text.clone()),
            Value::Number(number) => Some(number.to_string()),
            Value::Null | Value::Array(_) | Value::Object(_) => None,
        };
        match (edit(&key, text.as_deref()), value) {
            (Edit::Drop, _) => {}
            (Edit::Set(new), _) => drop(kept.insert(name, Value::from(new))),
            (Edit::Keep, Value::Object(inner)) => {
                drop(kept.insert(name, Value::Object(members_of(inner, &key, edit))))
            }
            (Edit::Keep, value) => drop(kept.insert(name, value)),
        }
    }
    kept
}

/// A restored disk is an image file, whatever device held the old one.
pub(super) fn on_file(option: &QemuOption) -> QemuOption {
    rewrite(option, &mut |key, value| match (last(key), value) {
        ("driver" | "format", Some("host_device")) => Edit::Set("file".to_owned()),
        ("file", Some(value)) => match value.strip_prefix("host_device:") {
            Some(path) => Edit::Set(path.to_owned()),
            None => Edit::Keep,
        },
        _ => Edit::Keep,
    })
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn block_option_is_one_tree_in_every_spelling() {
        let spellings = [
            (
                "blockdev",
                "qcow2,node-name=d,read-only=on,file.driver=file,file.filename=a,,b,file.node-name=f",
            ),
            (
                "blockdev",
                r#"{"driver":"qcow2","node-name":"d","read-only":true,"file":{"driver":"file","filename":"a,b","node-name":"f"}}"#,
            ),
            (
                "drive",
                r#"node-name=d,read-only=on,file=json:{"driver":"qcow2",,"file":{"driver":"file",,"filename":"a,,b",,"node-name":"f"}}"#,
            ),
        ];
        for (name, value) in spellings {
            let option = QemuOption::with(name, value);
            let mut found = scalars(&option);
            found.sort();
            let expected = [
                ("driver", "qcow2"),
                ("file.driver", "file"),
                ("file.filename", "a,b"),
                ("file.node-name", "f"),
                ("node-name", "d"),
                ("read-only", "on"),
            ];
            assert_eq!(
                found,
                expected.map(|(key, value)| (key.to_owned(), value.to_owned())),
                "{value}"
            );
            assert_eq!(node_names(&option), ["d", "f"]);
            assert_eq!(get(&option, "file.filename").as_deref(), Some("a,b"));
            let same = rewrite(&option, &mut |_, _| Edit::Keep);
            assert_eq!(scalars(&same).len(), expected.len(), "{}", same.value());
        }
    }

    #[test]
    fn member_is_dropped_with_all_that_is_in_it() {
        let drop_backing = |value: &str| {
            let is_it = |key: &str| key == "backing" || key.starts_with("backing.");
            let option = QemuOption::with("blockdev", value);
            let edit =
                &mut |key: &str, _: Option<&str>| if is_it(key) { Edit::Drop } else { Edit::Keep };
            rewrite(&option, edit).value().to_owned()
        };
        assert_eq!(
            drop_backing("driver=qcow2,backing.driver=raw,backing.file.filename=x,file=f"),
            "driver=qcow2,file=f"
        );
        assert_eq!(drop_backing(r#"{"driver":"qcow2","backing":null}"#), r#"{"driver":"qcow2"}"#);
        assert_eq!(
            drop_backing(r#"{"driver":"qcow2","backing":{"driver":"raw"}}"#),
            r#"{"driver":"qcow2"}"#
        );
    }
}
