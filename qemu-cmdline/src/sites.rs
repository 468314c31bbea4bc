//! Every value of a command line with what the table says of it, in whatever form it is written: a
//! list, dotted keys, JSON, `json:` behind a drive's `file=`, the old words of a serial port. One
//! walk serves reading and rewriting.

use crate::arguments::{KeyList, QemuOption};
use crate::form::{Form, is_on};
use crate::table::{self, Group, Kind, Syntax, Use};
use serde_json::{Map, Value};
use std::collections::HashSet;

/// One value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Site<'a> {
    /// The option's name, without a dash.
    pub option: &'a str,
    /// Dotted; empty where the option has no keys.
    pub key: &'a str,
    /// Without quoting, and without a scheme before a path (`file:`, `unix:`).
    pub value: &'a str,
    /// What the value is for the host.
    pub means: Use,
}

/// Shows every value.
pub fn visit(options: &[QemuOption], mut look: impl FnMut(&Site<'_>)) {
    let mut nothing = |site: &Site<'_>| {
        look(site);
        None
    };
    let monitors = monitor_chardevs(options);
    for option in options {
        let _ = Walk { option, monitors: &monitors, change: &mut nothing }.option();
    }
}

/// Replaces each value that `change` answers for.
pub fn rewrite(
    options: Vec<QemuOption>,
    mut change: impl FnMut(&Site<'_>) -> Option<String>,
) -> Vec<QemuOption> {
    let monitors = monitor_chardevs(&options);
    let one = |option: QemuOption| {
        let changed = Walk { option: &option, monitors: &monitors, change: &mut change }.option();
        match changed {
            Some(value) => QemuOption::with(&option.name, value),
            None => option,
        }
    };
    options.into_iter().map(one).collect()
}

/// Character devices by which clients command QEMU.
pub(crate) fn monitor_chardevs(options: &[QemuOption]) -> HashSet<String> {
    let id = |option: &QemuOption| match table::syntax(&option.name) {
        Some(Syntax::Keys(_, Group::Monitor)) => Form::of(option).get("chardev"),
        Some(Syntax::Keys(_, Group::Object)) => {
            let form = Form::of(option);
            form.get("chardev")
                .filter(|_| form.get("qom-type").is_some_and(|kind| kind.starts_with("monitor-")))
        }
        Some(Syntax::Chardev { monitor: true }) => {
            option.value().strip_prefix("chardev:").map(str::to_owned)
        }
        Some(Syntax::Chardev { .. }) => {
            option.value().strip_prefix("mon:chardev:").map(str::to_owned)
        }
        _ => None,
    };
    options.iter().filter_map(id).collect()
}

struct Walk<'a> {
    option: &'a QemuOption,
    monitors: &'a HashSet<String>,
    change: &'a mut dyn FnMut(&Site<'_>) -> Option<String>,
}

impl Walk<'_> {
    fn show(&mut self, key: &str, value: &str, means: Use) -> Option<String> {
        (self.change)(&Site { option: &self.option.name, key, value, means })
    }

    /// The option's new value, if anything changed.
    fn option(&mut self) -> Option<String> {
        let value = self.option.value();
        match table::syntax(&self.option.name) {
            None => self.show("", value, Use::Unknown),
            Some(Syntax::Flag) => {
                self.show("", "", table::flag_use(&self.option.name));
                None
            }
            Some(Syntax::Text(means)) => self.text("", value, means),
            Some(Syntax::Keys(_, Group::Global)) => self.global(value),
            Some(Syntax::Keys(_, group)) => self.keys(group),
            Some(Syntax::Chardev { monitor }) => self.chardev(value, monitor),
            Some(Syntax::Vnc) => self.vnc(value),
        }
    }

    fn text(&mut self, key: &str, value: &str, means: Use) -> Option<String> {
        if means != Use::Disk {
            return self.show(key, value, means);
        }
        if let Some(tree) = value.strip_prefix("json:") {
            return match serde_json::from_str(tree) {
                Ok(Value::Object(mut members)) => self
                    .object(key, &mut members, Group::Block)
                    .then(|| format!("json:{}", text(members))),
                _ => self.show(key, value, means),
            };
        }
        match value.strip_prefix("file:") {
            Some(path) => self.show(key, path, means).map(|path| format!("file:{path}")),
            None => self.show(key, value, means),
        }
    }

    fn keys(&mut self, group: Group) -> Option<String> {
        if let Some(rest) =
            self.option.value().strip_prefix("vnc=").filter(|_| group == Group::Display)
        {
            return self.vnc(rest).map(|value| format!("vnc={value}"));
        }
        match Form::of(self.option) {
            // QEMU reads more than JSON (single quotes): what we cannot read is not judged by its
            // words.
            Form::List { .. } if self.option.value().starts_with('{') => {
                self.show("", self.option.value(), Use::Never)
            }
            Form::Object(mut members) => {
                self.object("", &mut members, group).then(|| text(members))
            }
            form => self.list(&form, group),
        }
    }

    fn list(&mut self, form: &Form, group: Group) -> Option<String> {
        let Form::List { keys, implied } = form else { return None };
        let mut keys = keys.clone();
        let implied = *implied;
        let own = Own::of(form, implied, group, self.monitors);
        let changed = keys.map_values(|_, key, value| {
            let key = key.or(implied)?;
            if group == Group::AcpiTable && ["file", "data"].contains(&key) {
                return self.paths(key, value);
            }
            self.text(key, value, table::key_use(group, own.kind(), key, value))
        });
        changed.then(|| keys.to_string())
    }

    /// A list of paths with colons.
    fn paths(&mut self, key: &str, value: &str) -> Option<String> {
        let mut changed = false;
        let mut one = |path: &str| match self.show(key, path, Use::Boot) {
            Some(new) => {
                changed = true;
                new
            }
            None => path.to_owned(),
        };
        let paths: Vec<String> = value.split(':').map(&mut one).collect();
        changed.then(|| paths.join(":"))
    }

    fn object(&mut self, prefix: &str, members: &mut Map<String, Value>, group: Group) -> bool {
        let own = Own::of(
            &Form::Object(members.clone()),
            table::implied_key(&self.option.name),
            group,
            self.monitors,
        );
        members.iter_mut().fold(false, |changed, (key, value)| {
            self.member(&below(prefix, key), value, group, &own) | changed
        })
    }

    fn member(&mut self, key: &str, value: &mut Value, group: Group, own: &Own) -> bool {
        match value {
            Value::String(text) => {
                match self.text(key, text, table::key_use(group, own.kind(), key, text)) {
                    Some(new) => {
                        *text = new;
                        true
                    }
                    None => false,
                }
            }
            Value::Object(members) => members.iter_mut().fold(false, |changed, (name, value)| {
                self.member(&below(key, name), value, group, own) | changed
            }),
            Value::Array(items) => items
                .iter_mut()
                .fold(false, |changed, item| self.member(key, item, group, own) | changed),
            _ => false,
        }
    }

    /// `DRIVER.PROPERTY=VALUE`, or the three as keys.
    fn global(&mut self, value: &str) -> Option<String> {
        let head = value
            .split_once('=')
            .and_then(|(head, rest)| Some((head, head.split_once('.')?, rest)));
        if let Some((head, (driver, property), rest)) = head {
            let kind = Kind { name: driver, ..Kind::default() };
            let means = table::key_use(Group::Device, kind, property, rest);
            return self.show(property, rest, means).map(|new| format!("{head}={new}"));
        }
        let mut keys = KeyList::parse(value);
        let (driver, property) = (
            keys.get("driver").unwrap_or_default().to_owned(),
            keys.get("property").unwrap_or_default().to_owned(),
        );
        let changed = keys.map_values(|_, key, value| {
            let kind = Kind { name: &driver, ..Kind::default() };
            let is_value = key == Some("value");
            let means = if is_value {
                table::key_use(Group::Device, kind, &property, value)
            } else {
                Use::Plain
            };
            self.show(if is_value { &property } else { key.unwrap_or_default() }, value, means)
        });
        changed.then(|| keys.to_string())
    }

    /// What QEMU's `qemu_chr_parse_compat` reads.
    fn chardev(&mut self, value: &str, monitor: bool) -> Option<String> {
        if let Some(rest) = value.strip_prefix("mon:") {
            return self.chardev(rest, true).map(|rest| format!("mon:{rest}"));
        }
        if let Some(rest) = value.strip_prefix("unix:") {
            return self.unix("unix:", rest);
        }
        for (scheme, means) in [("file:", Use::Output), ("pipe:", Use::Connect)] {
            if let Some(path) = value.strip_prefix(scheme) {
                let means = table::of_path(means, path);
                return self.show("path", path, means).map(|path| format!("{scheme}{path}"));
            }
        }
        let is_network = ["tcp:", "telnet:", "tn3270:", "websocket:", "udp:"]
            .iter()
            .any(|scheme| value.starts_with(scheme));
        if is_network {
            return self.show("", value, if monitor { Use::Control } else { Use::Address });
        }
        let means = if value.starts_with('/') {
            table::of_path(Use::HostDevice, value)
        } else {
            Use::Plain
        };
        self.show("", value, means)
    }

    /// `PATH,server=on,…`.
    fn unix(&mut self, scheme: &str, rest: &str) -> Option<String> {
        let mut keys = KeyList::parse(rest);
        let is_on = |key: &str| {
            keys.get(key).is_some_and(|value| ["on", "yes", "true", "y"].contains(&value))
        };
        let means = match (is_on("abstract"), is_on("server")) {
            (true, _) => Use::Control,
            (false, true) => Use::Listen,
            (false, false) => Use::Connect,
        };
        let changed = keys.map_values(|index, key, value| {
            if index == 0 && key.is_none() || key == Some("path") {
                self.show("path", value, means)
            } else {
                self.show(key?, value, Use::Plain)
            }
        });
        changed.then(|| format!("{scheme}{keys}"))
    }

    fn vnc(&mut self, value: &str) -> Option<String> {
        let mut keys = KeyList::parse(value);
        let changed = keys.map_values(|_, key, value| match key {
            None | Some("vnc") => match value.strip_prefix("unix:") {
                Some(path) => self.show("", path, Use::Listen).map(|path| format!("unix:{path}")),
                None => {
                    let host = value.rsplit_once(':').map_or("", |(host, _)| host);
                    let is_closed = value == "none" || table::is_loopback(host);
                    self.show("", value, if is_closed { Use::Plain } else { Use::Display })
                }
            },
            Some(key) => self.show(key, value, Use::Plain),
        });
        changed.then(|| keys.to_string())
    }
}

/// What [`Kind`] borrows.
struct Own {
    name: String,
    is_server: bool,
    is_abstract: bool,
    is_monitor: bool,
}

impl Own {
    fn of(form: &Form, implied: Option<&str>, group: Group, monitors: &HashSet<String>) -> Self {
        let is_tree = matches!(form, Form::Object(_));
        let name = implied
            .and_then(|key| form.get(key))
            .or_else(|| form.get("backend.type"))
            .unwrap_or_default();
        let addressed =
            |key: &str| form.get(key).or_else(|| form.get(&format!("backend.data.{key}")));
        let server = addressed("server");
        // In QMP's words a socket serves unless it says that it does not.
        let is_server = server
            .map_or(is_tree && group == Group::Chardev && form.has("backend.type"), |text| {
                is_on(&text)
            });
        let is_abstract = addressed("abstract")
            .or_else(|| form.get("backend.data.addr.data.abstract"))
            .is_some_and(|text| is_on(&text));
        let is_monitor =
            form.get("id").is_some_and(|id| group == Group::Chardev && monitors.contains(&id));
        Self { name, is_server, is_abstract, is_monitor }
    }

    fn kind(&self) -> Kind<'_> {
        Kind {
            name: &self.name,
            is_server: self.is_server,
            is_abstract: self.is_abstract,
            is_monitor: self.is_monitor,
        }
    }
}

fn below(prefix: &str, key: &str) -> String {
    if prefix.is_empty() { key.to_owned() } else { format!("{prefix}.{key}") }
}

fn text(members: Map<String, Value>) -> String {
    Value::Object(members).to_string()
}

#[cfg(test)]
mod test;
