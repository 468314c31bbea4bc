//! QEMU's command line and its configuration files.
//!
//! An input is the words of a command line with a NUL byte behind each, as in `/proc/PID/cmdline`;
//! or, when it begins with `[` or `#`, a file for `-readconfig`.

use qemu_cmdline::restorable::{Carried, Wishes, check as find, map};
use qemu_cmdline::size::ram_bytes;
use qemu_cmdline::{Form, KeyList, QemuOption, Use, config, parse, rewrite, visit, words};

/// Longer than any value, with everything that has to be quoted in a list.
const OTHER_PATH: &str = "/restored,a=b";

/// Parses the command line or the file; whether it is one.
pub(crate) fn check(input: &[u8]) -> bool {
    let text = String::from_utf8_lossy(input);
    if text.starts_with(['[', '#']) {
        let Ok(options) = config::parse(&text) else { return false };
        let line = words(&options);
        assert_eq!(parse(&line).expect("a file's options are a command line"), options);
        options.iter().for_each(option);
        return true;
    }
    let line: Vec<String> = text.split_terminator('\0').map(str::to_owned).collect();
    let Ok(options) = parse(&line) else { return false };
    assert_same_words(&line, &options);
    assert_eq!(parse(&words(&options)).as_ref(), Ok(&options));
    options.iter().for_each(option);
    assert_rewritten(&options);
    restorable(options);
    true
}

/// No word is lost, changed or added: but for a second dash, and the option of a lone image.
fn assert_same_words(line: &[String], options: &[QemuOption]) {
    let mut line = line.iter();
    for option in options {
        let word = line.next().expect("an option has its word");
        let Some(name) = word.strip_prefix('-') else {
            assert_eq!(*option, QemuOption::with("hda", word));
            continue;
        };
        assert_eq!(option.name, name.strip_prefix('-').unwrap_or(name));
        if let Some(value) = &option.value {
            assert_eq!(line.next(), Some(value));
        }
    }
    assert_eq!(line.next(), None);
}

/// One value by itself: as a list, in the form that it has, as a size.
fn option(option: &QemuOption) {
    let value = option.value();
    let list = option.keys();
    let written = list.to_string();
    assert_eq!(KeyList::parse(&written), list, "{value:?}");
    // QEMU ignores a comma at the end.
    assert!(written == value || Some(written.as_str()) == value.strip_suffix(','), "{value:?}");
    let form = Form::of(option);
    assert_eq!(Form::of(&form.clone().into_option(&option.name)), form, "{value:?}");
    form.deep_scalars();
    if let Ok(bytes) = ram_bytes(value) {
        assert_eq!(bytes % 8192, 0);
    }
}

type Seen = Vec<(String, String, String, Use)>;

fn sites(options: &[QemuOption]) -> Seen {
    let mut seen = Seen::new();
    visit(options, |site| {
        seen.push((site.option.into(), site.key.into(), site.value.into(), site.means));
    });
    seen
}

fn assert_rewritten(options: &[QemuOption]) {
    assert_eq!(rewrite(options.to_vec(), |_| None), options);
    let seen = sites(options);
    let same = rewrite(options.to_vec(), |site| Some(site.value.to_owned()));
    assert_eq!(sites(&same), seen, "written as it was read");
    let moved =
        rewrite(options.to_vec(), |site| (site.means == Use::Disk).then(|| OTHER_PATH.to_owned()));
    let expected = seen.into_iter().map(|(option, key, value, means)| {
        let value = if means == Use::Disk { OTHER_PATH.to_owned() } else { value };
        (option, key, value)
    });
    let found = sites(&moved).into_iter().map(|(option, key, value, _)| (option, key, value));
    assert_eq!(found.collect::<Vec<_>>(), expected.collect::<Vec<_>>(), "disks are moved alone");
}

/// What a restore makes of a saved command line.
fn restorable(options: Vec<QemuOption>) {
    let nothing =
        Carried { is_disk: &|_| false, is_boot_file: &|_| false, is_qemus_own: &|_| false };
    let everything =
        Carried { is_disk: &|_| true, is_boot_file: &|_| true, is_qemus_own: &|_| true };
    let findings = find(&options, &nothing);
    let carried = find(&options, &everything);
    assert!(carried.iter().all(|finding| findings.contains(finding)), "what is carried adds none");
    let allow: Vec<String> = findings.iter().map(|finding| finding.allowance()).collect();
    let mut mapped = map(options, &Wishes { map: Vec::new(), allow: allow.clone() });
    let (open, unused) = mapped.check(&nothing, &allow);
    assert!(open.iter().all(|finding| finding.is_fatal()), "{open:?}");
    assert_eq!(unused, [""; 0], "each was needed");
    mapped.relocate(&[]);
    mapped.drop_data_directories(&[]);
    let again = words(&mapped.options);
    assert_eq!(parse(&again).as_ref(), Ok(&mapped.options));
}
