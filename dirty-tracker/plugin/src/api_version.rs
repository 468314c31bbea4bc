//! Telling QEMU that we were built for exactly its plugin API.
//!
//! QEMU reads the symbol `qemu_plugin_version` right after loading us and refuses a number outside
//! its range, and the ranges of the versions do not overlap: 1 up to QEMU 8.2; 2 and up since 9.0;
//! only 7 in 11.1. We call none of its functions, so any number is true; which one is accepted is
//! learned from the symbols that QEMU exports. A launcher that knows better sets [`OVERRIDE`]:
//! asking for 999 makes QEMU name the versions that it takes.
#![allow(unsafe_code, reason = "symbols that QEMU and the dynamic linker look up")]

use std::ffi::CStr;
use std::sync::atomic::{AtomicI32, Ordering};

/// Environment variable that overrules the choice.
const OVERRIDE: &CStr = c"STILLPOINT_PLUGIN_API";

/// Newest first: a symbol that QEMU exports from some version on, and the API number to claim then.
const MARKS: [(&CStr, i32); 2] = [(c"qemu_plugin_set_pc", 7), (c"qemu_plugin_scoreboard_new", 2)];

/// The API of every QEMU that has none of the marks.
const OLDEST: i32 = 1;

/// Read by QEMU as a C `int`.
#[unsafe(no_mangle)]
#[allow(non_upper_case_globals, reason = "QEMU looks for this name")]
pub(crate) static qemu_plugin_version: AtomicI32 = AtomicI32::new(OLDEST);

/// Runs when the library is loaded, before QEMU looks at the version.
#[used]
#[unsafe(link_section = ".init_array")]
static CHOOSE: extern "C" fn() = choose;

extern "C" fn choose() {
    let version = overruled().unwrap_or_else(|| from_symbols(exported));
    qemu_plugin_version.store(version, Ordering::Relaxed);
}

fn overruled() -> Option<i32> {
    // SAFETY: the name is a C string, and QEMU is still single-threaded when it loads plugins, so
    // that no other thread changes the environment while we read it.
    let value = unsafe { libc::getenv(OVERRIDE.as_ptr()) };
    if value.is_null() {
        return None;
    }
    // SAFETY: getenv returned a C string that stays valid until the environment is changed; see
    // above.
    unsafe { CStr::from_ptr(value) }.to_str().ok()?.trim().parse().ok()
}

fn from_symbols(has: impl Fn(&CStr) -> bool) -> i32 {
    MARKS.iter().find(|(symbol, _)| has(symbol)).map_or(OLDEST, |(_, version)| *version)
}

fn exported(symbol: &CStr) -> bool {
    // SAFETY: looks a C string up in the loaded objects; the address is only compared with null,
    // never used.
    !unsafe { libc::dlsym(libc::RTLD_DEFAULT, symbol.as_ptr()) }.is_null()
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn each_generation_of_qemu_gets_a_version_that_it_accepts() {
        assert_eq!(from_symbols(|_| false), 1);
        assert_eq!(from_symbols(|symbol| symbol == c"qemu_plugin_scoreboard_new"), 2);
        assert_eq!(from_symbols(|_| true), 7);
    }
}
