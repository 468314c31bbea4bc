//! Everything that talks to the kernel in pointers: the only unsafe code of this library.
//!
//! Three files are the plugin's own, compiled a second time: what both sides must agree on exists once.
#![allow(unsafe_code)]

pub mod pagemap;
pub mod read_mapping;
pub mod receive;
pub mod scratch;
pub mod write_protect;

// Each side uses its half of these.
#[allow(dead_code)]
#[path = "../../plugin/src/uapi.rs"]
pub mod uapi;
#[allow(dead_code)]
#[path = "../../plugin/src/uffd.rs"]
pub mod uffd;
#[allow(dead_code)]
#[path = "../../plugin/src/wire.rs"]
pub mod wire;

use std::io;

/// The result of an ioctl as a `Result`.
fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}
