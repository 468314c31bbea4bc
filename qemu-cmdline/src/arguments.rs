//! A QEMU command line taken apart into options, so that the launcher can read and change it
//! without guessing: which word is an option, which is its value, and how `key=value` lists are
//! quoted.

use crate::table;
use thiserror::Error;

#[derive(Debug, Error, PartialEq, Eq)]
#[expect(missing_docs, reason = "the message of each variant documents it and its fields")]
pub enum ArgumentError {
    #[error("the QEMU arguments hold a lone '{0}': an option name was expected")]
    NoName(String),
    #[error("QEMU option -{0} stands last and has no value")]
    NoValue(String),
}

error_class::classes! { ArgumentError = Usage; }

/// One option as QEMU reads it; `name` has no leading dash.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QemuOption {
    /// Without the leading dash.
    pub name: String,
    /// What follows it, if it takes a value.
    pub value: Option<String>,
}

impl QemuOption {
    /// An option without a value.
    pub fn flag(name: &str) -> Self {
        Self { name: name.to_owned(), value: None }
    }

    /// An option with a value.
    pub fn with(name: &str, value: impl Into<String>) -> Self {
        Self { name: name.to_owned(), value: Some(value.into()) }
    }

    /// The value, empty where there is none.
    pub fn value(&self) -> &str {
        self.value.as_deref().unwrap_or("")
    }

    /// The value as a `key=value` list.
    pub fn keys(&self) -> KeyList {
        KeyList::parse(self.value())
    }
}

/// Splits a command line into options. A word without a dash is a disk image, as for QEMU (`-hda`).
///
/// # Errors
/// When a word is no option where one is expected, or an option lacks its value.
pub fn parse(words: &[String]) -> Result<Vec<QemuOption>, ArgumentError> {
    let mut options = Vec::new();
    let mut words = words.iter();
    while let Some(word) = words.next() {
        let Some(name) = word.strip_prefix('-') else {
            options.push(QemuOption::with("hda", word));
            continue;
        };
        let name = name.strip_prefix('-').unwrap_or(name);
        if name.is_empty() {
            return Err(ArgumentError::NoName(word.clone()));
        }
        if table::is_flag(name) {
            options.push(QemuOption::flag(name));
            continue;
        }
        match words.next() {
            Some(value) => options.push(QemuOption::with(name, value)),
            None => return Err(ArgumentError::NoValue(name.to_owned())),
        }
    }
    Ok(options)
}

/// The words that QEMU gets.
pub fn words(options: &[QemuOption]) -> Vec<String> {
    let mut words = Vec::new();
    for option in options {
        // A name of its own dash keeps it: two are taken off, three are not.
        let dashes = if option.name.starts_with('-') { "--" } else { "-" };
        words.push(format!("{dashes}{}", option.name));
        words.extend(option.value.clone());
    }
    words
}

/// A `key=value,key=value` list in its order. A first part without `=` is the list's implied key; a
/// comma inside a value is written twice.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KeyList {
    parts: Vec<(Option<String>, String)>,
}

impl KeyList {
    /// Parses `key=value,…`, as QEMU does.
    pub fn parse(text: &str) -> Self {
        let mut parts = Vec::new();
        let mut rest = text;
        while !rest.is_empty() {
            let name_end = rest.find(['=', ',']).unwrap_or(rest.len());
            let (key, value) = if rest[name_end..].starts_with('=') {
                let key = rest[..name_end].to_owned();
                (Some(key), take_value(&rest[name_end + 1..]))
            } else if parts.is_empty() {
                (None, take_value(rest))
            } else {
                // A switch: its name ends at the comma, doubled or not.
                (None, (rest[..name_end].to_owned(), &rest[name_end..]))
            };
            parts.push((key, value.0));
            rest = value.1.strip_prefix(',').unwrap_or(value.1);
        }
        Self { parts }
    }

    /// The last value of `key`, as QEMU takes it. A switch alone is `on`, with `no` before it `off`
    /// (`server,nowait`).
    pub fn get(&self, key: &str) -> Option<&str> {
        let value = |(index, (name, value)): (usize, &'_ (Option<String>, String))| match name {
            Some(name) => (name == key).then_some(index),
            None => (index > 0 && switch(value, key).is_some()).then_some(index),
        };
        let (name, text) = &self.parts[self.parts.iter().enumerate().rev().find_map(value)?];
        if name.is_some() { Some(text) } else { switch(text, key) }
    }

    /// The value of `key`, or the first part when it has no key of its own.
    pub fn get_or_implied(&self, key: &str) -> Option<&str> {
        self.get(key).or_else(|| match self.parts.first() {
            Some((None, value)) => Some(value.as_str()),
            _ => None,
        })
    }

    /// The same without `key`, and without a first word that stands for it.
    pub fn without(&self, key: &str, is_implied: bool) -> Self {
        let is_it = |(index, (name, value)): &(usize, &(Option<String>, String))| match name {
            Some(name) => name == key,
            None => {
                if *index == 0 {
                    is_implied
                } else {
                    switch(value, key).is_some()
                }
            }
        };
        Self {
            parts: self
                .parts
                .iter()
                .enumerate()
                .filter(|part| !is_it(part))
                .map(|(_, part)| part.clone())
                .collect(),
        }
    }

    /// Adds a key, or without one a bare word, at the end.
    pub fn push(&mut self, key: Option<&str>, value: impl Into<String>) {
        self.parts.push((key.map(str::to_owned), value.into()));
    }

    /// Replaces each value that `change` answers for; says whether any was. A switch has no value.
    pub fn map_values(
        &mut self,
        mut change: impl FnMut(usize, Option<&str>, &str) -> Option<String>,
    ) -> bool {
        let mut changed = false;
        for (index, (key, value)) in self.parts.iter_mut().enumerate() {
            if key.is_none() && index > 0 {
                continue;
            }
            if let Some(new) = change(index, key.as_deref(), value) {
                *value = new;
                changed = true;
            }
        }
        changed
    }

    /// All keys (`None` for a bare word) and values, in their order.
    pub fn iter(&self) -> impl Iterator<Item = (Option<&str>, &str)> {
        self.parts.iter().map(|(key, value)| (key.as_deref(), value.as_str()))
    }
}

impl std::fmt::Display for KeyList {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (number, (key, value)) in self.parts.iter().enumerate() {
            if number > 0 {
                f.write_str(",")?;
            }
            match key {
                Some(key) => write!(f, "{key}={}", value.replace(',', ",,"))?,
                None if number == 0 => f.write_str(&value.replace(',', ",,"))?,
                None => f.write_str(value)?,
            }
        }
        // An empty word at the end is there by its comma.
        let is_open =
            self.parts.last().is_some_and(|(key, value)| key.is_none() && value.is_empty());
        if is_open { f.write_str(",") } else { Ok(()) }
    }
}

/// What the word `text` makes of the switch `key`.
pub(crate) fn switch(text: &str, key: &str) -> Option<&'static str> {
    if text == key {
        return Some("on");
    }
    (text.strip_prefix("no") == Some(key)).then_some("off")
}

/// The value up to the first comma that stands alone, and what follows (that comma first).
fn take_value(text: &str) -> (String, &str) {
    let mut value = String::new();
    let mut rest = text;
    while let Some(comma) = rest.find(',') {
        value.push_str(&rest[..comma]);
        let Some(after) = rest[comma + 1..].strip_prefix(',') else {
            return (value, &rest[comma..]);
        };
        value.push(',');
        rest = after;
    }
    value.push_str(rest);
    (value, "")
}

#[cfg(test)]
mod test {
    use super::*;

    fn strings(words: &[&str]) -> Vec<String> {
        words.iter().map(|word| (*word).to_owned()).collect()
    }

    #[test]
    fn options_keep_their_order_and_values() {
        let line =
            strings(&["-m", "1G", "--nographic", "disk.img", "-S", "-append", "-not-an-option"]);
        let options = parse(&line).unwrap();
        assert_eq!(options[0], QemuOption::with("m", "1G"));
        assert_eq!(options[1], QemuOption::flag("nographic"));
        assert_eq!(options[2], QemuOption::with("hda", "disk.img"));
        assert_eq!(options[4], QemuOption::with("append", "-not-an-option"));
        assert_eq!(words(&options)[3..5], strings(&["-hda", "disk.img"]));
    }

    #[test]
    fn an_option_without_its_value_is_named() {
        let error = parse(&strings(&["-smp", "2", "-drive"])).unwrap_err();
        assert!(error.to_string().contains("-drive"), "{error}");
    }

    #[test]
    fn doubled_commas_belong_to_the_value() {
        let list = KeyList::parse("q35,file=/a,,b.img,read-only=on");
        assert_eq!(list.get("file"), Some("/a,b.img"));
        assert_eq!(list.get_or_implied("type"), Some("q35"));
        assert_eq!(list.to_string(), "q35,file=/a,,b.img,read-only=on");
    }
}
