//! The table of QEMU's options, held against what each QEMU says of itself. No guest runs.

use qemu_cmdline::Use;
use qemu_cmdline::table::{self, Group, Kind};
use qemu_cmdline::unsupported;
use serde_json::{Value, json};
use std::path::Path;
use std::process::{Command, Output};
use stillpoint_tests::{QmpClient, on_each_qemu, wait_until};

/// Models that end QEMU when it is asked for their properties, or that a build has only as a
/// module.
const NOT_ASKED: &[&str] = &["-gl", "rutabaga"];

fn ask(qemu: &Path, words: &[&str]) -> Output {
    Command::new(qemu).args(words).output().expect("QEMU can be run")
}

fn said(output: &Output) -> String {
    format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}

#[test]
fn table_knows_every_option_of_qemu() {
    on_each_qemu(|qemu| {
        let help = said(&ask(qemu, &["-help"]));
        let words = help
            .lines()
            .filter_map(|line| line.strip_prefix('-'))
            .filter_map(|line| line.split([' ', ',', '[']).next());
        let names: Vec<&str> = words
            .flat_map(|word| word.split('/'))
            .map(|name| name.trim_start_matches('-'))
            .collect();
        assert!(names.len() > 80, "the help has another form: {names:?}");
        let missing: Vec<&&str> =
            names.iter().filter(|name| table::syntax(name).is_none()).collect();
        assert!(missing.is_empty(), "options without a row: {missing:?}");
    });
}

/// Which options take a value decides what every word after them is: QEMU is shown a `-version`
/// behind each, and says its version only where that is an option of its own.
#[test]
fn table_knows_which_options_take_a_value() {
    on_each_qemu(|qemu| {
        let directory = tempfile::tempdir().expect("a directory");
        let ends = ["h", "help", "?", "version", "audio-help"];
        for name in table::options().filter(|name| !ends.contains(name)) {
            let option = format!("-{name}");
            let mut command = Command::new(qemu);
            command.args([&option, "-version", "-machine", "help"]).current_dir(directory.path());
            let text = said(&command.output().expect("QEMU can be run"));
            let is_known =
                !text.contains("invalid option") && !text.contains("not supported for this target");
            assert!(
                !is_known || text.contains("emulator version") == table::is_flag(name),
                "{option}: {text}"
            );
        }
    });
}

#[test]
fn table_knows_every_alias_of_a_device() {
    on_each_qemu(|qemu| {
        let help = said(&ask(qemu, &["-machine", "none", "-device", "help"]));
        let quoted = |line: &str, word: &str| {
            line.split_once(&format!("{word} \""))
                .and_then(|(_, rest)| Some(rest.split_once('"')?.0.to_owned()))
        };
        let aliases =
            help.lines().filter_map(|line| Some((quoted(line, "alias")?, quoted(line, "name")?)));
        let unknown: Vec<(String, String)> =
            aliases.filter(|(alias, name)| table::device_model(alias) != name).collect();
        assert!(help.contains("alias \"ac97\""), "{help}");
        assert!(unknown.is_empty(), "aliases that the table has otherwise: {unknown:?}");
    });
}

/// QEMU itself says which devices it cannot save: each of the list, where it has them.
#[test]
fn unmigratable_devices_are_those_of_qemu() {
    on_each_qemu(|qemu| {
        for device in unsupported::UNMIGRATABLE {
            let words = [
                "-machine",
                "q35,accel=tcg",
                "-m",
                "16",
                "-nodefaults",
                "-display",
                "none",
                "-S",
                "-only-migratable",
                "-device",
                "qemu-xhci",
            ];
            let crypto = ["-object", "cryptodev-backend-builtin,id=c"];
            let with = if device.starts_with("virtio-crypto") { ",cryptodev=c" } else { "" };
            let message = said(&ask(
                qemu,
                &[&words[..], &crypto, &["-device", &format!("{device}{with}")]].concat(),
            ));
            let is_right = message.contains("not migratable")
                || message.contains("is not a valid device model name");
            assert!(is_right, "{device}: {message}");
        }
    });
}

/// Every text that a device of this QEMU takes is in the table: as a path of some kind, or as no
/// path.
#[test]
fn table_knows_every_text_of_a_device() {
    on_each_qemu(|qemu| {
        let directory = tempfile::tempdir().expect("a directory");
        let socket = directory.path().join("qmp");
        let monitor = format!("unix:{},server=on,wait=off", socket.display());
        let mut child = Command::new(qemu)
            .args(["-machine", "none", "-nodefaults", "-display", "none", "-qmp", &monitor])
            .spawn()
            .expect("QEMU");
        assert!(
            wait_until(std::time::Duration::from_secs(20), || socket.exists()),
            "QEMU did not start"
        );
        let mut qmp = QmpClient::connect(&socket);
        let unknown = unknown_texts(&mut qmp);
        let _ = child.kill();
        child.wait().expect("QEMU ends");
        assert!(unknown.is_empty(), "no row for {unknown:?}");
    });
}

fn unknown_texts(qmp: &mut QmpClient) -> Vec<String> {
    let models =
        qmp.execute("qom-list-types", json!({ "implements": "device", "abstract": false }));
    let names = models.as_array().into_iter().flatten().filter_map(|row| row["name"].as_str());
    let asked = names
        .filter(|name| !NOT_ASKED.iter().any(|part| name.contains(part)) && !name.ends_with("-cpu"))
        .map(str::to_owned);
    let mut unknown = Vec::new();
    for model in asked.collect::<Vec<_>>() {
        let Ok(list) = qmp.try_execute("device-list-properties", json!({ "typename": model }))
        else {
            continue;
        };
        for property in list.as_array().into_iter().flatten().filter(|row| is_text(row)) {
            let name = property["name"].as_str().unwrap_or_default();
            let kind = Kind { name: &model, ..Kind::default() };
            if table::key_use(Group::Device, kind, name, "/x") == Use::Unknown {
                unknown.push(format!("{model}.{name}"));
            }
        }
    }
    unknown
}

fn is_text(property: &Value) -> bool {
    matches!(property["type"].as_str(), Some("str" | "string"))
        && !property["name"].as_str().unwrap_or_default().starts_with("tls-")
}
