//! What must hold for whatever comes from outside: each module has a `check` that reads an input as
//! production does, panics when the reader does what it promises not to do, and returns whether the
//! input is sound.
//!
//! The fuzz targets (`fuzz/targets`) call [`check`] with what libFuzzer makes; the test below calls
//! it with the seeds and past findings (`fuzz/seeds`).

mod command_line;
mod control_socket;
mod index_segment;
mod layer_table;
mod manifest;
mod nbd;
mod nbd_server;
mod pack;
mod plugin_greeting;
mod qmp;
mod sealing;
mod stream_reader;

/// Reads an input and says whether it is sound.
type Check = fn(&[u8]) -> bool;

/// The targets by name; each has a directory of seeds.
const TARGETS: &[(&str, Check)] = &[
    ("command_line", command_line::check),
    ("control_socket", control_socket::check),
    ("index_segment", index_segment::check),
    ("layer_table", layer_table::check),
    ("manifest", manifest::check),
    ("nbd", nbd::check),
    ("nbd_server", nbd_server::check),
    ("pack", pack::check),
    ("plugin_greeting", plugin_greeting::check),
    ("qmp", qmp::check),
    ("stream_reader", stream_reader::check),
];

/// Reads an input of a target and says whether it is sound.
///
/// # Panics
/// When the reader does what it promises not to do, or there is no such target.
pub fn check(target: &str, input: &[u8]) -> bool {
    let (_, check) = TARGETS.iter().find(|(name, _)| *name == target).expect("a target's name");
    check(input)
}

#[cfg(test)]
mod test {
    use super::*;
    use std::collections::BTreeSet;
    use std::path::Path;

    #[test]
    fn fuzz_seeds_and_past_findings_are_read() {
        let seeds = Path::new(env!("CARGO_MANIFEST_DIR")).join("../seeds");
        let names = |directory: &Path| -> BTreeSet<String> {
            let entries = std::fs::read_dir(directory).expect("a directory");
            entries
                .map(|entry| entry.expect("an entry").file_name().into_string().expect("text"))
                .collect()
        };
        let targets: BTreeSet<String> =
            TARGETS.iter().map(|(name, _)| (*name).to_owned()).collect();
        assert_eq!(names(&seeds), targets, "each target has its seeds");
        let programs = names(&seeds.join("../targets"));
        let programs: BTreeSet<String> =
            programs.iter().map(|file| file.trim_end_matches(".rs").to_owned()).collect();
        assert_eq!(programs, targets, "each target is a program");
        for (target, check) in TARGETS {
            let directory = seeds.join(target);
            let sound = names(&directory).into_iter().filter(|name| {
                println!("{target}/{name}");
                check(&std::fs::read(directory.join(name)).expect("a seed"))
            });
            assert!(sound.count() >= 2, "{target}: the real ones are sound");
        }
    }
}
