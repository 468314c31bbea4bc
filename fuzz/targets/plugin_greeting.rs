//! The greeting between tracker and plugin.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    fuzz_checks::check("plugin_greeting", data);
});
