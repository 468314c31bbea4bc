//! The plugin in QEMU: opens a userfaultfd and a few files of `/proc/self` inside the VM's process,
//! and passes their descriptors to each client that may connect to a unix socket.
//!
//! `-plugin file=libstillpoint_plugin.so,socket=PATH[,ramfd=N]`, on any accelerator. `N` is the
//! descriptor of the RAM file that QEMU inherited; clients get a duplicate.
//!
//! QEMU (7.2 and 10.0 at least) loads plugins after `-daemonize` has forked and before it drops
//! privileges: the thread and the descriptors are those of the process that runs the guest.
//!
//! What it does not do is the point. It registers no callback, so that it costs the guest nothing;
//! it decides nothing: the tracker makes every ioctl from its own process; and when the tracker
//! dies the guest does not notice. It must not panic into QEMU, so each way in is wrapped, and a
//! failure while QEMU starts stops QEMU with one line that says why.
#![warn(missing_docs, clippy::missing_errors_doc, clippy::missing_panics_doc)]
#![allow(unsafe_code, reason = "QEMU calls in, with pointers")]
#![cfg_attr(not(test), deny(clippy::cast_possible_truncation))]

mod api_version;
mod handles;
mod server;

use std::ffi::{CStr, OsStr, c_char, c_int, c_void};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::RawFd;
use std::os::unix::ffi::OsStrExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

/// More arguments than this are a mistake, not ours.
const MAX_ARGUMENTS: usize = 16;

static INSTALLED: AtomicBool = AtomicBool::new(false);

/// Called by QEMU once it has accepted our version; anything but 0 makes it exit.
///
/// # Safety
/// As QEMU's plugin API has it: `argv` points to `argc` C strings.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qemu_plugin_install(
    _id: u64,
    _info: *const c_void,
    argc: c_int,
    argv: *const *const c_char,
) -> c_int {
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        // SAFETY: the caller's promise is the same as ours.
        let arguments = unsafe { collect(argc, argv) };
        install(&arguments)
    }));
    match outcome {
        Ok(Ok(())) => 0,
        Ok(Err(reason)) => complain(&reason),
        Err(_) => complain("internal error while starting; this is a bug in the plugin"),
    }
}

fn complain(reason: &str) -> c_int {
    // Unlike eprintln!, this does not panic when standard error is closed.
    let _ = io::Write::write_all(
        &mut io::stderr(),
        format!("stillpoint plugin: {reason}\n").as_bytes(),
    );
    1
}

/// # Safety
/// `argv` points to `argc` C strings that live as long as `'a`.
unsafe fn collect<'a>(argc: c_int, argv: *const *const c_char) -> Vec<&'a [u8]> {
    let count = usize::try_from(argc).unwrap_or(0).min(MAX_ARGUMENTS);
    if argv.is_null() {
        return Vec::new();
    }
    (0..count)
        .map(|index| {
            // SAFETY: `index` is below `argc`, and each entry is a C string: the caller's promise.
            unsafe { CStr::from_ptr(*argv.add(index)) }.to_bytes()
        })
        .collect()
}

fn install(arguments: &[&[u8]]) -> Result<(), String> {
    let arguments = Arguments::parse(arguments)?;
    if INSTALLED.swap(true, Ordering::Relaxed) {
        return Err("loaded twice; give -plugin once".into());
    }
    let api_version = api_version::qemu_plugin_version.load(Ordering::Relaxed);
    let handles = handles::Handles::open(api_version, arguments.ram_fd);
    let listener = server::listen(&arguments.socket)
        .map_err(|error| cannot_listen(&arguments.socket, &error))?;
    spawn(move || server::serve(&listener, &handles))
        .map_err(|error| format!("cannot start a thread: {error}"))
}

fn cannot_listen(path: &Path, error: &io::Error) -> String {
    let remedy = match error.kind() {
        io::ErrorKind::AddrInUse => "give each QEMU a socket= of its own",
        _ => "give socket= a short path in a writable directory",
    };
    format!("cannot listen on {}: {error}; {remedy}", path.display())
}

/// Starts a thread that no signal is delivered to: QEMU counts on its own threads to get them.
fn spawn(body: impl FnOnce() + Send + 'static) -> io::Result<()> {
    let before = block_signals();
    let spawned = std::thread::Builder::new().name("stillpoint".into()).spawn(body);
    // SAFETY: `before` was filled in by pthread_sigmask.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const before, std::ptr::null_mut()) };
    spawned.map(drop)
}

/// Blocks every signal in this thread, and so in those that it starts; returns the mask from
/// before.
fn block_signals() -> libc::sigset_t {
    let mut all = MaybeUninit::<libc::sigset_t>::uninit();
    let mut before = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: sigfillset initialises `all`; pthread_sigmask reads it and initialises `before`, and
    // cannot fail with SIG_BLOCK.
    unsafe {
        libc::sigfillset(all.as_mut_ptr());
        libc::pthread_sigmask(libc::SIG_BLOCK, all.as_ptr(), before.as_mut_ptr());
        before.assume_init()
    }
}

#[derive(Debug, PartialEq, Eq)]
struct Arguments {
    socket: PathBuf,
    ram_fd: Option<RawFd>,
}

impl Arguments {
    fn parse(arguments: &[&[u8]]) -> Result<Self, String> {
        let mut socket = None;
        let mut ram_fd = None;
        for argument in arguments {
            if let Some(path) = argument.strip_prefix(b"socket=") {
                socket = Some(PathBuf::from(OsStr::from_bytes(path)));
            } else if let Some(number) = argument.strip_prefix(b"ramfd=") {
                ram_fd = Some(parse_fd(number)?);
            } else {
                let unknown = String::from_utf8_lossy(argument);
                return Err(format!(
                    "unknown argument '{unknown}'; expected socket=PATH and ramfd=N"
                ));
            }
        }
        let socket = socket.ok_or("socket=PATH is missing")?;
        Ok(Self { socket, ram_fd })
    }
}

fn parse_fd(number: &[u8]) -> Result<RawFd, String> {
    std::str::from_utf8(number)
        .ok()
        .and_then(|text| text.parse().ok())
        .filter(|fd| *fd >= 0)
        .ok_or_else(|| {
            format!("ramfd={} is not a descriptor number", String::from_utf8_lossy(number))
        })
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn arguments_as_qemu_passes_them() {
        let parsed = Arguments::parse(&[b"socket=/run/vm.sock", b"ramfd=7"]);
        assert_eq!(parsed, Ok(Arguments { socket: "/run/vm.sock".into(), ram_fd: Some(7) }));
        let parsed = Arguments::parse(&[b"socket=a=b"]);
        assert_eq!(parsed, Ok(Arguments { socket: "a=b".into(), ram_fd: None }));
    }

    #[test]
    fn wrong_arguments_say_what_was_expected() {
        for (arguments, expected) in [
            (&[][..], "socket=PATH is missing"),
            (&[&b"socket=x"[..], b"ramfd=-1"][..], "not a descriptor number"),
            (&[&b"socket=x"[..], b"ramfd=\xff"][..], "not a descriptor number"),
            (&[&b"sock=x"[..]][..], "unknown argument 'sock=x'"),
        ] {
            let error = Arguments::parse(arguments).unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
    }
}
