//! A layer's manifest and block table.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    fuzz_checks::check("layer_table", data);
});
