//! What commands and helpers say to each other over the control socket.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    fuzz_checks::check("control_socket", data);
});
