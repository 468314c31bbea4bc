//! QEMU's configuration files (`-readconfig`), as its `qemu_config_parse` reads them.

use crate::arguments::{KeyList, QemuOption};
use crate::table::{self, Syntax};
use thiserror::Error;

/// Config groups whose option has another name than the group.
const RENAMED: &[(&str, &str)] = &[("memory", "m"), ("smp-opts", "smp"), ("boot-opts", "boot")];

/// A line that is no group and no key of one.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("line {number}: expected '[group]' or 'key = \"value\"', found '{line}'")]
pub struct ConfigError {
    number: usize,
    line: String,
}

error_class::classes! { ConfigError = Failed; }

struct Group<'a> {
    option: &'a str,
    list: KeyList,
}

impl Group<'_> {
    fn into_option(self) -> QemuOption {
        QemuOption::with(self.option, self.list.to_string())
    }
}

/// The options that a file stands for.
///
/// # Errors
/// When a line is no group that is an option with keys, and no key of a group.
pub fn parse(text: &str) -> Result<Vec<QemuOption>, ConfigError> {
    let mut options = Vec::new();
    let mut open: Option<Group<'_>> = None;
    for (number, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let wrong = || ConfigError { number: number + 1, line: line.to_owned() };
        if let Some(head) = line.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
            options.extend(open.take().map(Group::into_option));
            open = Some(group(head).ok_or_else(wrong)?);
            continue;
        }
        let (key, value) = entry(line).ok_or_else(wrong)?;
        open.as_mut().ok_or_else(wrong)?.list.push(Some(key), value);
    }
    options.extend(open.map(Group::into_option));
    Ok(options)
}

/// `device "net0"` or `machine`.
fn group(head: &str) -> Option<Group<'_>> {
    let (name, id) = match head.split_once('"') {
        Some((name, id)) => (name.trim(), Some(id.strip_suffix('"')?)),
        None => (head.trim(), None),
    };
    let renamed = RENAMED.iter().find(|(group, _)| *group == name);
    let option = renamed.map_or(name, |(_, option)| option);
    let mut list = KeyList::default();
    if let Some(id) = id {
        list.push(Some("id"), id);
    }
    // What the table does not know is refused with its name, later.
    let has_keys = matches!(table::syntax(option), None | Some(Syntax::Keys(..)));
    (is_name(option) && has_keys).then_some(Group { option, list })
}

/// `key = "value"`. QEMU ends a value at its second quotation mark: there is no way to write one.
fn entry(line: &str) -> Option<(&str, &str)> {
    let (key, value) = line.split_once('=')?;
    let (key, value) = (key.trim(), value.trim().strip_prefix('"')?.strip_suffix('"')?);
    (is_name(key) && !value.contains('"')).then_some((key, value))
}

/// What a command line can have as an option's name, and a list as a key.
fn is_name(text: &str) -> bool {
    !text.is_empty() && !text.starts_with('-') && !text.contains([' ', '\t', ',', '='])
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn groups_become_options_in_order() {
        let text = "# a VM\n[machine]\n  type = \"q35\"\n\n[memory]\n size = \"1024\"\n\
                    [drive \"root\"]\n file = \"a,b.qcow2\"\n if = \"none\"\n";
        let options = parse(text).unwrap();
        assert_eq!(options[0], QemuOption::with("machine", "type=q35"));
        assert_eq!(options[1], QemuOption::with("m", "size=1024"));
        assert_eq!(options[2], QemuOption::with("drive", "id=root,file=a,,b.qcow2,if=none"));
    }

    #[test]
    fn a_wrong_line_is_named() {
        let error = parse("[machine]\ntype q35\n").unwrap_err();
        assert!(error.to_string().contains("line 2"), "{error}");
        assert!(parse("type = \"q35\"").is_err());
    }

    /// A command line with these would be another one than QEMU reads from the file.
    #[test]
    fn config_names_and_values_that_no_command_line_has() {
        for text in ["[]", "[nographic]", "[append]", "[-m]", "[device \"a]"] {
            assert!(parse(text).is_err(), "{text}");
        }
        for entry in ["a,b = \"c\"", "= \"c\"", "a b = \"c\"", "a = \"b\" c \"d\"", "a = \""] {
            assert!(parse(&format!("[device]\n{entry}\n")).is_err(), "{entry}");
        }
    }
}
