//! What must hold for whatever comes from outside: each module has a `check` that reads an input as
//! production does, panics when the reader does what it promises not to do, and returns whether the
//! input is sound.
//!
//! The fuzz targets (`fuzz/targets`) call it with what libFuzzer makes; the test below calls it
//! with the seeds and past findings (`fuzz/seeds`).

pub mod command_line;
pub mod control_socket;
pub mod index_segment;
pub mod layer_table;
pub mod manifest;
pub mod nbd;
pub mod nbd_server;
pub mod pack;
pub mod plugin_greeting;
pub mod qmp;
mod sealing;
pub mod stream_reader;

/// Reads an input and says whether it is sound.
pub type Check = fn(&[u8]) -> bool;

/// The targets by name; each has a directory of seeds.
pub const TARGETS: &[(&str, Check)] = &[
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
