//! Finds on a command line, and among the devices of a running VM, what the table
//! [`crate::table::unsupported`] refuses, in whatever form it is written.

use crate::arguments::QemuOption;
use crate::form::{Form, is_on};
use crate::sites::visit;
pub use crate::table::unsupported::{Command, ROWS, Row, UNMIGRATABLE, USER_NETWORKS, Value, What};
use crate::table::{self, Use, matches, unsupported};
use std::fmt;

/// One thing that a command refuses; displayed with the reason and the remedy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// The row of the table.
    pub row: &'static Row,
    command: Command,
    place: String,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { row, command, place } = self;
        let adopt_alone = *command == Command::Adopt && !row.is_refused_by(Command::Attach);
        let cannot = match command {
            Command::Adopt if adopt_alone => "be adopted",
            Command::Run if !row.is_refused_by(Command::Attach) => "be used with 'stillpoint run'",
            Command::Restore => "be restored",
            _ => "be checkpointed",
        };
        write!(f, "{place} cannot {cannot}: {}; {}", row.reason(), row.remedy())?;
        if adopt_alone { f.write_str(", or checkpoint it by stream as it is") } else { Ok(()) }
    }
}

/// The first thing on the command line that `command` refuses.
pub fn on_line(options: &[QemuOption], command: Command) -> Option<Refusal> {
    options.iter().find_map(|option| {
        let form = Form::of(option);
        refused_by(command).find_map(|(row, what)| {
            Some(Refusal { row, command, place: place(what, option, &form)? })
        })
    })
}

/// Why no checkpoint can have a device of a running VM, by its QOM type alone; `place` names it.
pub fn device(model: &str, place: &str) -> Option<Refusal> {
    let row = unsupported::device(model, Command::Checkpoint)?;
    Some(refusal_of_running(row, place))
}

/// Properties for which no checkpoint can have a device of that model in a running VM, each with
/// the values that are refused and its row.
pub fn properties(model: &str) -> impl Iterator<Item = (&'static str, Value, &'static Row)> {
    running().filter_map(move |(row, what)| match *what {
        What::Property(family, key, value) if matches(&[family], model) => Some((key, value, row)),
        _ => None,
    })
}

/// Models of which a running VM can have only one, where QEMU saves all under one name.
pub fn several() -> impl Iterator<Item = (&'static str, &'static Row)> {
    running().filter_map(|(row, what)| match *what {
        What::Several(model) => Some((model, row)),
        _ => None,
    })
}

/// What a checkpoint says of a row that it found in the running VM.
pub fn refusal_of_running(row: &'static Row, place: &str) -> Refusal {
    Refusal { row, command: Command::Checkpoint, place: place.to_owned() }
}

fn running() -> impl Iterator<Item = (&'static Row, &'static What)> {
    refused_by(Command::Checkpoint)
}

fn refused_by(command: Command) -> impl Iterator<Item = (&'static Row, &'static What)> {
    let rows = ROWS.iter().filter(move |row| row.is_refused_by(command));
    rows.flat_map(|row| row.what().iter().map(move |what| (row, what)))
}

impl Value {
    /// Whether the value of a key (none where the key is absent) is one of these.
    pub fn has(self, value: Option<&str>) -> bool {
        match self {
            Self::Any => value.is_some(),
            Self::On => value.is_some_and(is_on),
            Self::Off => !value.is_some_and(is_on),
            Self::Is(this) => value == Some(this),
            Self::Not(these) => !these.contains(&value.unwrap_or_default()),
        }
    }
}

/// Where the option has it, in the words of the command line.
fn place(what: &What, option: &QemuOption, form: &Form) -> Option<String> {
    let name = option.name.as_str();
    match *what {
        What::Options(names) => names.contains(&name).then(|| format!("-{name}")),
        What::Devices(models) => {
            let (word, model) = model(option, form)?;
            matches(models, &model).then(|| format!("-{name} {word}").trim_end().to_owned())
        }
        What::Objects(types) => {
            let kind = form.get("qom-type").filter(|_| name == "object")?;
            matches(types, &kind).then(|| format!("-object {kind}"))
        }
        What::Key(options, key, value) => {
            let first = || option.value().split(',').next().unwrap_or_default().to_owned();
            let found = if key.is_empty() { Some(first()) } else { form.get(key) };
            let equals = if key.is_empty() { String::new() } else { format!("{key}=") };
            (options.contains(&name) && value.has(found.as_deref()))
                .then(|| format!("-{name} {equals}{}", found.unwrap_or_default()))
        }
        What::Property(model, key, value) => property(model, key, value, option, form),
        What::Disks(key, value) => disk(key, value, option, form),
        What::Descriptors => descriptor(option),
        What::Several(_) => None,
    }
}

/// The word by which an option names a device model, and the model that it makes.
fn model(option: &QemuOption, form: &Form) -> Option<(String, String)> {
    match option.name.as_str() {
        "device" => {
            let word = form.get("driver")?;
            let model = table::device_model(&word).to_owned();
            Some((word, model))
        }
        "usbdevice" => Some((option.value().to_owned(), format!("usb-{}", option.value()))),
        "audio" => {
            let word = form.get("model")?;
            let model = table::audio_model(&word).to_owned();
            Some((format!("model={word}"), model))
        }
        name => {
            let (_, _, model) = table::SHORTHANDS.iter().find(|(option, ..)| *option == name)?;
            Some((String::new(), (*model).to_owned()))
        }
    }
}

fn property(
    family: &str,
    key: &str,
    value: Value,
    option: &QemuOption,
    form: &Form,
) -> Option<String> {
    if option.name == "device" {
        let word = form.get("driver").unwrap_or_default();
        let found = form.get(key);
        return (matches(&[family], table::device_model(&word)) && value.has(found.as_deref()))
            .then(|| format!("-device {word},{key}={}", found.unwrap_or_default()));
    }
    if option.name != "global" {
        return None;
    }
    let (driver, property, found) = global(option, form)?;
    (matches(&[family], &driver) && matches(&[key], &property) && value.has(Some(&found)))
        .then(|| format!("-global {driver}.{property}={found}"))
}

/// `-global DRIVER.PROPERTY=VALUE`, or the three by their keys.
fn global(option: &QemuOption, form: &Form) -> Option<(String, String, String)> {
    if let Some(driver) = form.get("driver") {
        return Some((driver, form.get("property")?, form.get("value").unwrap_or_default()));
    }
    let (driver, rest) = option.value().split_once('.')?;
    let (property, value) = rest.split_once('=')?;
    Some((driver.to_owned(), property.to_owned(), value.to_owned()))
}

fn disk(key: &str, value: Value, option: &QemuOption, form: &Form) -> Option<String> {
    let name = option.name.as_str();
    if key == "protocol" {
        return protocol(value, option);
    }
    if !["drive", "blockdev"].contains(&name) {
        return None;
    }
    let is_it = |(path, found): &(String, String)| {
        path.split('.').any(|part| part == key) && value.has(Some(found))
    };
    let (path, found) = form.deep_scalars().into_iter().find(is_it)?;
    Some(format!("-{name} {path}={found}"))
}

fn protocol(value: Value, option: &QemuOption) -> Option<String> {
    let mut found = None;
    visit(std::slice::from_ref(option), |site| {
        let is_file = site.means == Use::Disk && (site.key == "file" || site.key.is_empty());
        let protocol = protocol_of(site.value).filter(|_| is_file);
        if protocol.is_some_and(|protocol| value.has(Some(protocol))) {
            found.get_or_insert_with(|| format!("-{} {}", site.option, site.value));
        }
    });
    found
}

/// As QEMU finds it: what stands before a colon, if no slash comes first. `file:` is none.
fn protocol_of(path: &str) -> Option<&str> {
    let (name, _) = path.split_at(path.find([':', '/'])?);
    path[name.len()..].starts_with(':').then_some(name)
}

fn descriptor(option: &QemuOption) -> Option<String> {
    let mut found = None;
    visit(std::slice::from_ref(option), |site| {
        let is_key = site.option == "add-fd"
            || matches!(
                site.key.rsplit('.').next(),
                Some("fd" | "fds" | "vhostfd" | "vhostfds" | "sock_fd" | "sock-fds")
            );
        if site.means == Use::Process && is_key || site.value.starts_with("/dev/fdset/") {
            let equals = if site.key.is_empty() { "" } else { "=" };
            found.get_or_insert_with(|| {
                format!("-{} {}{equals}{}", site.option, site.key, site.value)
            });
        }
    });
    found
}

/// A command line for each thing of the row, by which tests try it; none for what only a running
/// VM shows.
pub fn examples(row: &Row) -> Vec<String> {
    row.what().iter().flat_map(examples_of).collect()
}

fn examples_of(what: &What) -> Vec<String> {
    let some = |name: &&str| name.replace('*', "x");
    let values = |value: Value| match value {
        Value::On => "on",
        Value::Off => "off",
        Value::Is(this) => this,
        Value::Any | Value::Not(_) => "other",
    };
    match *what {
        What::Options(names) => names
            .iter()
            .map(
                |name| if table::is_flag(name) { format!("-{name}") } else { format!("-{name} x") },
            )
            .collect(),
        What::Devices(models) => {
            models.iter().map(some).map(|model| format!("-device {model}")).collect()
        }
        What::Objects(types) => {
            types.iter().map(some).map(|kind| format!("-object {kind},id=o")).collect()
        }
        What::Key(options, "", value) => {
            options.iter().map(|name| format!("-{name} {}", values(value))).collect()
        }
        What::Key(options, key, value) => {
            options.iter().map(|name| format!("-{name} {key}={}", values(value))).collect()
        }
        What::Property(model, key, value) => {
            let (model, key, value) = (some(&model), some(&key), values(value));
            let global = format!("-global {model}.{key}={value}");
            match model.as_str() {
                "migration" => vec![global],
                _ => vec![global, format!("-device {model},{key}={value}")],
            }
        }
        What::Disks("protocol", _) => vec!["-drive file=other:x".to_owned()],
        What::Disks(key, value) => vec![format!("-drive {key}={}", values(value))],
        What::Descriptors => ["-add-fd fd=3,set=1", "-netdev tap,id=n,fd=3", "-hda /dev/fdset/1"]
            .map(str::to_owned)
            .to_vec(),
        What::Several(_) => Vec::new(),
    }
}

#[cfg(test)]
mod test;
