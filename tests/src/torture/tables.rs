//! What QEMU itself says that its command line may hold: machine types, devices and their
//! properties.

use crate::qmp::QmpClient;
use crate::random::Random;
use serde_json::json;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// A property of a device or VM, as `help` prints it.
#[derive(Clone, Debug)]
pub(super) struct Property {
    pub name: String,
    /// `bool`, `uint32`, `str`, `OnOffAuto`, `size`…
    pub kind: String,
}

pub(super) struct Tables {
    pub qemu: PathBuf,
    /// Devices with a bus that a PC has.
    pub devices: Vec<(String, String)>,
    pub vms: Vec<String>,
    pub cpus: Vec<String>,
    /// Options that are lists of parameters, by `query-command-line-options`.
    pub options: BTreeMap<String, Vec<Property>>,
    properties: std::cell::RefCell<BTreeMap<String, Vec<Property>>>,
}

impl Tables {
    pub(super) fn of(qemu: &Path) -> Self {
        let help_of_devices = help(qemu, &["-device", "help"]);
        let devices = help_of_devices.lines().filter_map(device);
        // A model of a vCPU fits no VM of another.
        let devices = devices.filter(|(name, _)| !name.ends_with("-cpu")).collect();
        let vms = help(qemu, &["-machine", "help"]).lines().skip(1).filter_map(vm).collect();
        let help_of_cpus = help(qemu, &["-cpu", "help"]);
        // Flags follow the models.
        let cpus = help_of_cpus
            .lines()
            .take_while(|line| !line.contains("CPUID flags"))
            .filter_map(cpu)
            .collect();
        Self {
            qemu: qemu.to_owned(),
            devices,
            vms,
            cpus,
            options: options(qemu),
            properties: Default::default(),
        }
    }

    /// Properties of a device; none if QEMU prints none.
    pub(super) fn properties(&self, device: &str) -> Vec<Property> {
        let known = self.properties.borrow().get(device).cloned();
        known.unwrap_or_else(|| {
            let found: Vec<Property> = help(&self.qemu, &["-device", &format!("{device},help")])
                .lines()
                .filter_map(property)
                .collect();
            self.properties.borrow_mut().insert(device.to_owned(), found.clone());
            found
        })
    }
}

fn help(qemu: &Path, words: &[&str]) -> String {
    let output =
        Command::new(qemu).args(words).stdin(Stdio::null()).output().expect("QEMU can be run");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// `name "e1000", bus PCI, alias "x", desc "…"`.
fn device(line: &str) -> Option<(String, String)> {
    let name = line.strip_prefix("name \"")?.split('"').next()?;
    let bus = line.split("bus ").nth(1).and_then(|rest| rest.split(',').next()).unwrap_or("none");
    Some((name.to_owned(), bus.trim().to_owned()))
}

fn vm(line: &str) -> Option<String> {
    let name = line.split_whitespace().next()?;
    (name.starts_with("pc") || name == "q35" || name == "isapc" || name == "microvm")
        .then(|| name.to_owned())
}

/// `x86 Haswell  (alias …)`, in 10.0 without the first word.
fn cpu(line: &str) -> Option<String> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let name = if words.first() == Some(&"x86") { words.get(1)? } else { words.first()? };
    let is_name = line.starts_with("  ") || words[0] == "x86";
    (is_name && !name.starts_with('(') && name.chars().any(char::is_lowercase) && name.len() > 2)
        .then(|| (*name).to_owned())
}

/// `  name=<kind>  - text`.
fn property(line: &str) -> Option<Property> {
    let (name, rest) = line.trim_start().split_once("=<")?;
    let kind = rest.split('>').next()?;
    Some(Property { name: name.to_owned(), kind: kind.to_owned() })
}

/// Asked of a QEMU without a VM.
fn options(qemu: &Path) -> BTreeMap<String, Vec<Property>> {
    let directory = tempfile::tempdir().expect("a directory");
    let socket = directory.path().join("q");
    let monitor = format!("unix:{},server=on,wait=off", socket.display());
    let words = ["-machine", "none", "-nodefaults", "-display", "none", "-qmp", &monitor];
    let mut child = Command::new(qemu)
        .args(words)
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("QEMU can be run");
    let up = crate::process::wait_until(std::time::Duration::from_secs(20), || socket.exists());
    assert!(up, "QEMU does not answer");
    let list = QmpClient::connect(&socket).execute("query-command-line-options", json!({}));
    child.kill().expect("a child");
    child.wait().expect("a child");
    let text = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
    let one = |option: &serde_json::Value| {
        let parameters = option["parameters"].as_array().into_iter().flatten();
        let parameters =
            parameters.map(|one| Property { name: text(&one["name"]), kind: text(&one["type"]) });
        (text(&option["option"]), parameters.collect())
    };
    list.as_array().into_iter().flatten().map(one).collect()
}

impl Property {
    /// A value of its kind, where one can be thought of.
    pub(super) fn draw(&self, random: &mut Random) -> Option<String> {
        let value = match self.kind.as_str() {
            "bool" | "boolean" => (*random.pick(&["on", "off"])).to_owned(),
            "OnOffAuto" => (*random.pick(&["on", "off", "auto"])).to_owned(),
            "uint8" | "uint16" | "uint32" | "uint64" | "int32" | "int64" | "int" | "number" => {
                (*random.pick(&["0", "1", "2", "3", "4", "8", "16", "64", "255", "1024"]))
                    .to_owned()
            }
            "size" => (*random.pick(&["4096", "64k", "1M", "8M", "16M", "64M"])).to_owned(),
            "str" | "string" => (*random.pick(&["x", "disk", "on", "raw"])).to_owned(),
            _ => return None,
        };
        Some(value)
    }
}
