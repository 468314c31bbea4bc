//! What an NBD server sends.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    fuzz_checks::check("nbd", data);
});
