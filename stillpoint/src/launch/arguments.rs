//! A QEMU command line taken apart into options, so that the launcher can read and change it without
//! guessing: which word is an option, which is its value, and how `key=value` lists are quoted.

use anyhow::{Result, bail};

/// Options of `qemu-system-x86_64` (7.2 to 11.1) that stand alone. Every other option takes one value.
const WITHOUT_VALUE: &[&str] = &[
    "?",
    "S",
    "alt-grab",
    "async-teardown",
    "ctrl-grab",
    "curses",
    "daemonize",
    "enable-fips",
    "enable-kvm",
    "enable-sync-profile",
    "fips",
    "full-screen",
    "h",
    "help",
    "mem-prealloc",
    "no-acpi",
    "no-fd-bootchk",
    "no-frame",
    "no-hpet",
    "no-quit",
    "no-reboot",
    "no-shutdown",
    "no-user-config",
    "nodefaults",
    "nographic",
    "nouserconfig",
    "old-param",
    "one-insn-per-tb",
    "only-migratable",
    "portrait",
    "preconfig",
    "s",
    "sdl",
    "semihosting",
    "singlestep",
    "snapshot",
    "usb",
    "version",
    "win2k-hack",
    "xen-attach",
    "xen-domid-restrict",
];

/// One option as QEMU reads it; `name` has no leading dash.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QemuOption {
    pub name: String,
    pub value: Option<String>,
}

impl QemuOption {
    pub fn flag(name: &str) -> Self {
        Self { name: name.to_owned(), value: None }
    }

    pub fn with(name: &str, value: impl Into<String>) -> Self {
        Self { name: name.to_owned(), value: Some(value.into()) }
    }

    pub fn value(&self) -> &str {
        self.value.as_deref().unwrap_or("")
    }

    /// The value as a `key=value` list.
    pub fn keys(&self) -> KeyList {
        KeyList::parse(self.value())
    }
}

/// Splits a command line into options. A word without a dash is a disk image, as for QEMU (`-hda`).
pub fn parse(words: &[String]) -> Result<Vec<QemuOption>> {
    let mut options = Vec::new();
    let mut words = words.iter();
    while let Some(word) = words.next() {
        let Some(name) = word.strip_prefix('-') else {
            options.push(QemuOption::with("hda", word));
            continue;
        };
        let name = name.strip_prefix('-').unwrap_or(name);
        if name.is_empty() {
            bail!("the QEMU arguments hold a lone '{word}': an option name was expected");
        }
        if WITHOUT_VALUE.contains(&name) {
            options.push(QemuOption::flag(name));
            continue;
        }
        match words.next() {
            Some(value) => options.push(QemuOption::with(name, value)),
            None => bail!("QEMU option -{name} stands last and has no value"),
        }
    }
    Ok(options)
}

/// The words that QEMU gets.
pub fn words(options: &[QemuOption]) -> Vec<String> {
    let mut words = Vec::new();
    for option in options {
        words.push(format!("-{}", option.name));
        words.extend(option.value.clone());
    }
    words
}

/// A `key=value,key=value` list in its order. A first part without `=` is the list's implied key; a comma
/// inside a value is written twice.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KeyList {
    parts: Vec<(Option<String>, String)>,
}

impl KeyList {
    pub fn parse(text: &str) -> Self {
        let mut parts = Vec::new();
        for part in split_commas(text) {
            match part.split_once('=') {
                Some((key, value)) => parts.push((Some(key.to_owned()), value.to_owned())),
                None => parts.push((None, part)),
            }
        }
        Self { parts }
    }

    /// The last value of `key`, as QEMU takes it.
    pub fn get(&self, key: &str) -> Option<&str> {
        let hit = self.parts.iter().rev().find(|(name, _)| name.as_deref() == Some(key));
        hit.map(|(_, value)| value.as_str())
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
        let is_it = |(index, (name, _)): &(usize, &(Option<String>, String))| match name {
            Some(name) => name == key,
            None => is_implied && *index == 0,
        };
        Self { parts: self.parts.iter().enumerate().filter(|part| !is_it(part)).map(|(_, part)| part.clone()).collect() }
    }

    pub fn push(&mut self, key: Option<&str>, value: impl Into<String>) {
        self.parts.push((key.map(str::to_owned), value.into()));
    }

    /// Replaces each whole value that `change` answers for.
    pub fn map_values(&mut self, mut change: impl FnMut(&str) -> Option<String>) -> bool {
        let mut changed = false;
        for (_, value) in &mut self.parts {
            if let Some(new) = change(value) {
                *value = new;
                changed = true;
            }
        }
        changed
    }

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
            if let Some(key) = key {
                write!(f, "{key}=")?;
            }
            f.write_str(&value.replace(',', ",,"))?;
        }
        Ok(())
    }
}

fn split_commas(text: &str) -> Vec<String> {
    let mut parts = Vec::new();
    let mut part = String::new();
    let mut letters = text.chars().peekable();
    while let Some(letter) = letters.next() {
        match letter {
            ',' if letters.peek() == Some(&',') => {
                letters.next();
                part.push(',');
            }
            ',' => parts.push(std::mem::take(&mut part)),
            other => part.push(other),
        }
    }
    if !part.is_empty() || parts.is_empty() && !text.is_empty() {
        parts.push(part);
    }
    parts
}

/// A memory size as `-m` takes it: a plain number counts MiB, suffixes are B, K, M, G, T.
pub fn parse_memory_size(text: &str) -> Result<u64> {
    let digits = text.trim_end_matches(|letter: char| letter.is_ascii_alphabetic());
    let number: f64 = match digits.parse() {
        Ok(number) if (0.0..1e15).contains(&number) => number,
        _ => bail!("'{text}' is no memory size: give MiB as a plain number, or a suffix as in 4G"),
    };
    let unit: u64 = match text[digits.len()..].to_ascii_uppercase().as_str() {
        "" | "M" | "MB" | "MIB" => 1 << 20,
        "B" => 1,
        "K" | "KB" | "KIB" => 1 << 10,
        "G" | "GB" | "GIB" => 1 << 30,
        "T" | "TB" | "TIB" => 1 << 40,
        other => bail!("'{text}' is no memory size: the suffix {other} is not one of B, K, M, G, T"),
    };
    Ok((number * unit as f64) as u64)
}

#[cfg(test)]
mod test {
    use super::*;

    fn strings(words: &[&str]) -> Vec<String> {
        words.iter().map(|word| (*word).to_owned()).collect()
    }

    #[test]
    fn options_keep_their_order_and_values() {
        let line = strings(&["-m", "1G", "--nographic", "disk.img", "-S", "-append", "-not-an-option"]);
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

    #[test]
    fn memory_sizes_are_those_of_qemu() {
        assert_eq!(parse_memory_size("512").unwrap(), 512 << 20);
        assert_eq!(parse_memory_size("1.5G").unwrap(), 3 << 29);
        assert!(parse_memory_size("4X").is_err());
        assert!(parse_memory_size("").is_err());
        assert!(parse_memory_size("-4").is_err());
    }
}
