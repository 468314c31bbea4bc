//! A segment of the index: its directory and a block.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    fuzz_checks::check("index_segment", data);
});
