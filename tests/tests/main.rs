//! All tests of whole VMs in one program: linked once, and so that tests of different files run
//! side by side. `tests/src/slots.rs` says how many VMs run at once.
//!
//! `cargo test -p stillpoint-tests attach::` runs those of one file.

mod adopt;
mod attach;
mod balloon;
mod block_options;
mod changes;
mod cmdline;
mod cmdline_table;
mod compatibility;
mod copies;
mod damage;
mod external;
mod hdfs;
mod hydration;
mod imports;
mod kills;
mod kills_stream;
mod launch;
mod layers;
mod layouts;
mod lazy;
mod libvirt;
mod lineage;
mod promises;
mod proof;
mod property;
mod quiet;
mod refusals;
mod resume;
mod rollback;
mod rows;
mod scripted;
mod states;
mod torture;
mod tpm;
mod window;
mod working_set;

/// A file that is not in the list above would not be compiled.
#[test]
fn every_file_of_tests_is_a_module_here() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests");
    let files =
        std::fs::read_dir(folder).expect("this folder").map(|file| file.expect("a file").path());
    let names =
        files.map(|file| file.file_stem().expect("a name").to_str().expect("UTF-8").to_owned());
    let tests = stillpoint_tests::own_tests();
    let is_here = |name: &str| tests.iter().any(|test| test.split("::").next() == Some(name));
    let missing: Vec<String> =
        names.filter(|name| !["main", "tidy"].contains(&name.as_str()) && !is_here(name)).collect();
    assert!(missing.is_empty(), "not in tests/tests/main.rs: {missing:?}");
}
