//! QEMU's command line and configuration files.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    fuzz_checks::check("command_line", data);
});
