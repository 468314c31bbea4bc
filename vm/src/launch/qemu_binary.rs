//! What a QEMU binary is: its version, its machine types and whether it takes plugins. Asked once
//! per binary of the binary itself (a VM of type `none`, about 60 ms), then kept in the cache
//! directory.

use crate::cache;
use crate::error::{VmError, explain, refused, usage};
use anyhow::{Context, Result, anyhow, bail};
use qmp_bridge::qmp::QemuVersion;
use qmp_bridge::qmp::replies::{Greeting, MachineType};
use qmp_bridge::said;
use serde::de::{DeserializeOwned, IgnoredAny};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

/// A QMP answer of `query-machines` has about 40 KB.
const MAX_ANSWER_BYTES: u64 = 4 << 20;
/// It answers within 100 ms; a loaded host may need longer.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Facts in another form, of earlier versions, are in `qemu`.
const CACHE: &str = "qemu-facts";

/// What a QEMU program says of itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QemuFacts {
    /// As `MAJOR.MINOR.MICRO`.
    pub version: String,
    /// The machine types that it has.
    #[serde(rename = "machines")]
    pub machine_types: Vec<MachineType>,
}

impl QemuFacts {
    /// The machine type that QEMU would take for `wanted`, aliases resolved.
    ///
    /// # Errors
    /// Refused if this QEMU has no such type.
    pub fn machine_type(&self, wanted: Option<&str>) -> Result<&MachineType, VmError> {
        let hit = self.machine_types.iter().find(|known| match wanted {
            Some(name) => known.name == name || known.alias.as_deref() == Some(name),
            None => known.is_default,
        });
        let missing = || match wanted {
            Some(name) => usage(format!(
                "QEMU {} has no machine type '{name}'; '-machine help' lists its types",
                self.version
            )),
            None => usage(format!(
                "QEMU {} has no default machine type; name one by -machine",
                self.version
            )),
        };
        Ok(hit.ok_or_else(missing)?)
    }
}

/// The facts of `binary`, from the cache when the binary has not changed since.
///
/// # Errors
/// Refused if it is no QEMU that runs with our plugin.
pub fn probe(binary: &Path, plugin: &Path) -> Result<QemuFacts, VmError> {
    let about = |path: &Path| {
        std::fs::metadata(path).with_context(|| format!("looking at {}", path.display()))
    };
    let (qemu, ours) = (about(binary)?, about(plugin)?);
    let identity = [
        qemu.dev(),
        qemu.ino(),
        qemu.size(),
        qemu.ctime().cast_unsigned(),
        ours.ino(),
        ours.size(),
        ours.ctime().cast_unsigned(),
    ];
    let key = format!("{}-{identity:?}", binary.display());
    if let Some(facts) = cache::load::<QemuFacts>(CACHE, &key) {
        return Ok(facts);
    }
    let facts = ask(binary, plugin)?;
    cache::save(CACHE, &key, &facts);
    Ok(facts)
}

fn ask(binary: &Path, plugin: &Path) -> Result<QemuFacts> {
    // Private, and with a name that no other user can guess: the socket's name is given to a QEMU
    // that may run as root.
    let private = private_directory().context("making a directory for QEMU's probe")?;
    let socket = private.path().join("plugin.sock");
    let said = tempfile::tempfile().context("making a file for QEMU's messages")?;
    let child = Command::new(binary)
        .args([
            "-machine",
            "none",
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-S",
            "-qmp",
            "stdio",
        ])
        .arg("-plugin")
        .arg(format!("file={},socket={}", comma(plugin), comma(&socket)))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(said.try_clone().context("opening the file for QEMU's messages twice")?)
        .spawn()
        .map_err(|error| refuse(binary, "", &error.into()))?;
    let answer = converse(child);
    answer.map_err(|error| refuse(binary, &said::quote_file(said), &error))
}

/// In /tmp where `TMPDIR` is too long for a socket's path.
fn private_directory() -> std::io::Result<tempfile::TempDir> {
    const MAX_PARENT: usize = 60;
    let parent = std::env::temp_dir();
    let parent = if parent.as_os_str().len() > MAX_PARENT { Path::new("/tmp") } else { &parent };
    tempfile::Builder::new().prefix("stillpoint-probe-").tempdir_in(parent)
}

/// In QEMU's lists of keys a comma is written twice.
fn comma(path: &Path) -> String {
    path.display().to_string().replace(',', ",,")
}

/// On a thread of its own, so that a program that says nothing is not waited for.
fn converse(mut child: Child) -> Result<QemuFacts> {
    let mut input = child.stdin.take().context("the probe's QEMU has no stdin")?;
    let output = child.stdout.take().context("the probe's QEMU has no stdout")?;
    let (sender, receiver) = mpsc::sync_channel(1);
    std::thread::spawn(move || {
        let facts = interview(&mut input, &mut BufReader::new(output.take(MAX_ANSWER_BYTES)));
        // An answer or none: this QEMU has no guest and nothing to lose.
        let _ = input.write_all(b"{\"execute\":\"quit\"}\n");
        let _ = sender.send(facts);
    });
    let facts = receiver
        .recv_timeout(TIMEOUT)
        .unwrap_or_else(|_| Err(anyhow!("it did not answer within {TIMEOUT:?}")));
    if facts.is_err() {
        let _ = child.kill();
    }
    child.wait().context("waiting for the probe's QEMU")?;
    facts
}

fn interview(input: &mut impl Write, lines: &mut impl BufRead) -> Result<QemuFacts> {
    let greeting: Greeting = answer(lines, "QMP").context("reading QEMU's greeting")?;
    ask_one::<IgnoredAny>(input, lines, "qmp_capabilities")?;
    let machine_types = ask_one(input, lines, "query-machines")?;
    Ok(QemuFacts { version: QemuVersion::from(greeting).to_string(), machine_types })
}

fn refuse(binary: &Path, said: &str, error: &anyhow::Error) -> anyhow::Error {
    let binary = binary.display();
    if said.contains("plugin") {
        return refused(format!(
            "{binary} does not take Stillpoint's plugin; use a QEMU built with --enable-plugins (Debian's are). It said: {said}"
        ));
    }
    let said = if said.is_empty() { String::new() } else { format!(". It said: {said}") };
    refused(format!(
        "{binary} does not answer as a QEMU does: {}; name a QEMU system emulator (Debian: apt-get install qemu-system-x86){said}",
        explain(error)
    ))
}

fn ask_one<T: DeserializeOwned>(
    input: &mut impl Write,
    lines: &mut impl BufRead,
    command: &str,
) -> Result<T> {
    writeln!(input, "{{\"execute\":\"{command}\"}}")
        .with_context(|| format!("sending {command}"))?;
    answer(lines, "return").with_context(|| format!("waiting for the answer to {command}"))
}

/// The next message that has `key`; events in between are passed over.
fn answer<T: DeserializeOwned>(lines: &mut impl BufRead, key: &str) -> Result<T> {
    let mut line = String::new();
    loop {
        line.clear();
        if lines.read_line(&mut line).context("reading QMP")? == 0 {
            bail!("it ended before it answered");
        }
        let mut message: Map<String, Value> = serde_json::from_str(&line)
            .with_context(|| format!("QMP answer is no JSON: {line}"))?;
        if let Some(error) = message.get("error") {
            bail!("it answered {error}");
        }
        if let Some(value) = message.remove(key) {
            return serde_json::from_value(value).context("the answer has an unknown form");
        }
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn machine_type_aliases_and_the_default_resolve_to_versioned_names() {
        let lines = r#"{"QMP": {"version": {"qemu": {"major": 10, "minor": 0, "micro": 2}, "package": ""}}}
            {"return": {}}
            {"event": "STOP"}
            {"return": [{"name": "pc-q35-10.0", "alias": "q35", "default-ram-id": "pc.ram"},
             {"name": "pc-i440fx-10.0", "alias": "pc", "is-default": true, "default-ram-id": "pc.ram"},
             {"name": "pc-i440fx-7.2"}]}"#;
        let lines = lines.replace(",\n", ",");
        let facts = interview(&mut Vec::new(), &mut lines.as_bytes()).unwrap();
        assert_eq!((facts.version.as_str(), facts.machine_types.len()), ("10.0.2", 3));
        let name = |wanted| facts.machine_type(wanted).map(|found| found.name.clone()).ok();
        assert_eq!(name(Some("q35")).as_deref(), Some("pc-q35-10.0"));
        assert_eq!(name(None).as_deref(), Some("pc-i440fx-10.0"));
        assert_eq!(name(Some("pc-i440fx-7.2")).as_deref(), Some("pc-i440fx-7.2"));
        assert!(facts.machine_type(Some("virt")).unwrap_err().to_string().contains("'virt'"));
    }
}
