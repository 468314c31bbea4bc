//! The two forms in which QEMU takes an option's value: a `key=value` list, or (as libvirt writes
//! most) a JSON object.
//!
//! Members of nested JSON objects are read and written under dotted keys, as the list form has them
//! (`file.filename`).

use crate::arguments::{KeyList, QemuOption, switch};
use crate::table;
use serde_json::{Map, Value};

/// The value of an option in one of QEMU's two notations.
#[derive(Clone, Debug, PartialEq)]
pub enum Form {
    /// A list of keys.
    List {
        /// The keys as written.
        keys: KeyList,
        /// The key that a bare first word has.
        implied: Option<&'static str>,
    },
    /// A JSON object.
    Object(Map<String, Value>),
}

/// As QEMU spells a switch that is on.
pub fn is_on(value: &str) -> bool {
    matches!(value, "on" | "yes" | "true" | "y")
}

impl Form {
    /// A value that begins as an object and is none is read as a list, as QEMU would refuse it.
    pub fn of(option: &QemuOption) -> Self {
        if option.value().starts_with('{')
            && let Ok(Value::Object(members)) = serde_json::from_str(option.value())
        {
            return Self::Object(members);
        }
        Self::List { keys: option.keys(), implied: table::implied_key(&option.name) }
    }

    /// The text of a scalar; booleans are `on` and `off`.
    pub fn get(&self, key: &str) -> Option<String> {
        match self {
            Self::List { keys, implied } if *implied == Some(key) => {
                keys.get_or_implied(key).map(str::to_owned)
            }
            Self::List { keys, implied } => {
                keys.get(key).or_else(|| first_switch(keys, *implied, key)).map(str::to_owned)
            }
            Self::Object(members) => scalar(at(members, key)?),
        }
    }

    /// Whether `key` has a scalar value.
    pub fn has(&self, key: &str) -> bool {
        self.get(key).is_some()
    }

    /// Whether `key` is switched on, however that is written.
    pub fn is_on(&self, key: &str) -> bool {
        self.get(key).is_some_and(|value| is_on(&value))
    }

    /// Removes every value of `key`.
    pub fn remove(&mut self, key: &str) {
        match self {
            Self::List { keys, implied } => *keys = keys.without(key, *implied == Some(key)),
            Self::Object(members) => drop(members.remove(key)),
        }
    }

    /// Sets a key of the first level.
    pub fn set(&mut self, key: &str, value: &str) {
        self.remove(key);
        match self {
            Self::List { keys, .. } => keys.push(Some(key), value),
            Self::Object(members) => drop(members.insert(key.to_owned(), Value::from(value))),
        }
    }

    /// Sets a switch in the words of the form.
    pub fn set_on(&mut self, key: &str) {
        match self {
            Self::List { .. } => self.set(key, "on"),
            Self::Object(members) => drop(members.insert(key.to_owned(), Value::Bool(true))),
        }
    }

    /// Sets `key` to a number, in the notation of the value.
    pub fn set_number(&mut self, key: &str, value: u64) {
        match self {
            Self::List { .. } => self.set(key, &value.to_string()),
            Self::Object(members) => drop(members.insert(key.to_owned(), Value::from(value))),
        }
    }

    /// Every scalar with its dotted key; a list's first word has its implied key, a switch alone is
    /// `on`.
    pub fn scalars(&self) -> Vec<(String, String)> {
        let mut found = Vec::new();
        match self {
            Self::List { keys, implied } => {
                for (index, (key, value)) in keys.iter().enumerate() {
                    match key.or(implied.filter(|_| index == 0)) {
                        Some(key) => found.push((key.to_owned(), value.to_owned())),
                        None => {
                            found.push((String::new(), value.to_owned()));
                            found.extend(switched(value));
                        }
                    }
                }
            }
            Self::Object(members) => walk("", &Value::Object(members.clone()), &mut found),
        }
        found
    }

    /// The same, with what stands in a `json:` text of some value below that value's key.
    pub fn deep_scalars(&self) -> Vec<(String, String)> {
        let mut found = Vec::new();
        for (key, value) in self.scalars() {
            let tree = value
                .strip_prefix("json:")
                .and_then(|tree| serde_json::from_str::<Value>(tree).ok());
            match tree {
                Some(tree) => walk(&key, &tree, &mut found),
                None => found.push((key, value)),
            }
        }
        found
    }

    /// Whether it has no keys.
    pub fn is_empty(&self) -> bool {
        match self {
            Self::List { keys, .. } => keys.iter().next().is_none(),
            Self::Object(members) => members.is_empty(),
        }
    }

    /// The option with this value.
    pub fn into_option(self, name: &str) -> QemuOption {
        match self {
            Self::List { keys, .. } => QemuOption::with(name, keys.to_string()),
            Self::Object(members) => QemuOption::with(name, Value::Object(members).to_string()),
        }
    }
}

/// Where no key is implied, the first word is a switch as the others are.
fn first_switch(keys: &KeyList, implied: Option<&str>, key: &str) -> Option<&'static str> {
    match keys.iter().next() {
        Some((None, word)) if implied.is_none() => switch(word, key),
        _ => None,
    }
}

/// What a word alone may say: `snapshot` is on, `nowait` sets `wait` off.
fn switched(word: &str) -> Vec<(String, String)> {
    let off = word
        .strip_prefix("no")
        .filter(|rest| !rest.is_empty())
        .map(|rest| (rest.to_owned(), "off".to_owned()));
    off.into_iter().chain([(word.to_owned(), "on".to_owned())]).collect()
}

fn at<'a>(members: &'a Map<String, Value>, key: &str) -> Option<&'a Value> {
    if let Some(value) = members.get(key) {
        return Some(value);
    }
    let (first, rest) = key.split_once('.')?;
    at(members.get(first)?.as_object()?, rest)
}

fn scalar(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Bool(on) => Some(if *on { "on" } else { "off" }.to_owned()),
        Value::Number(number) => Some(number.to_string()),
        Value::Null | Value::Array(_) | Value::Object(_) => None,
    }
}

fn walk(prefix: &str, value: &Value, found: &mut Vec<(String, String)>) {
    let below =
        |key: &str| if prefix.is_empty() { key.to_owned() } else { format!("{prefix}.{key}") };
    match value {
        Value::Object(members) => {
            members.iter().for_each(|(key, value)| walk(&below(key), value, found))
        }
        Value::Array(items) => items
            .iter()
            .enumerate()
            .for_each(|(index, value)| walk(&below(&index.to_string()), value, found)),
        other => found.extend(scalar(other).map(|text| (prefix.to_owned(), text))),
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn both_forms_are_read_alike() {
        for value in [
            "tap,id=n,vhost=on,fd=33,file.filename=/x",
            r#"{"type":"tap","id":"n","vhost":true,"fd":"33","file":{"filename":"/x"}}"#,
        ] {
            let form = Form::of(&QemuOption::with("netdev", value));
            let get = |key: &str| form.get(key).unwrap_or_default();
            assert_eq!(
                [get("type"), get("id"), get("fd"), get("file.filename")],
                ["tap", "n", "33", "/x"],
                "{value}"
            );
            assert!(form.is_on("vhost") && !form.has("script"));
            assert!(form.scalars().contains(&("file.filename".to_owned(), "/x".to_owned())));
        }
    }

    #[test]
    fn both_forms_are_changed_alike() {
        let mut list = Form::of(&QemuOption::with("netdev", "tap,id=n,fd=33"));
        let mut object =
            Form::of(&QemuOption::with("netdev", r#"{"type":"tap","id":"n","fd":"33"}"#));
        for form in [&mut list, &mut object] {
            form.remove("fd");
            form.set("ifname", "t,0");
            form.set_on("vhost");
        }
        assert_eq!(list.into_option("netdev").value(), "tap,id=n,ifname=t,,0,vhost=on");
        assert_eq!(
            object.into_option("netdev").value(),
            r#"{"id":"n","ifname":"t,0","type":"tap","vhost":true}"#
        );
    }

    #[test]
    fn what_is_no_object_is_a_list() {
        let form = Form::of(&QemuOption::with("device", "{broken"));
        assert_eq!(form.get("driver").as_deref(), Some("{broken"));
        assert_eq!(form.get("a.b"), None);
    }
}
