//! A layer's manifest and block table.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    fuzz_checks::layer_table::check(data);
});
