//! The plugin's socket: which clients get the descriptors, and what happens to all others.

mod support;

use std::fs;
use std::io::{IoSlice, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use dirty_tracker::{PluginHandles, TrackerError, UffdSource};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use procfs_core::FromRead;
use procfs_core::process::MemoryMaps;
use support::{StandIn, TIMEOUT};
use tempfile::TempDir;

const HELLO: &[u8; 16] = b"STILLPT?\x01\0\0\0\0\0\0\0";
const REPLY_LEN: usize = 64;
/// Longer than the plugin waits for a client, shorter than a hang.
const BOUND: Duration = Duration::from_secs(10);

fn client(guest: &StandIn) -> UnixStream {
    let stream = UnixStream::connect(&guest.socket).unwrap();
    stream.set_read_timeout(Some(BOUND)).unwrap();
    stream
}

/// Everything the plugin says until it hangs up.
fn answer(mut stream: UnixStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    // A connection that the plugin resets has said nothing.
    let _ = stream.read_to_end(&mut bytes);
    bytes
}

fn open_files(guest: &StandIn) -> usize {
    fs::read_dir(format!("/proc/{}/fd", guest.pid())).unwrap().count()
}

fn threads(guest: &StandIn) -> usize {
    fs::read_dir(format!("/proc/{}/task", guest.pid())).unwrap().count()
}

#[test]
fn a_client_gets_descriptors_of_the_process_that_it_asked() {
    let mut guest = StandIn::start(16, 16);
    let handles = guest.handles();
    assert_eq!(handles.pid(), guest.pid());
    assert_eq!(handles.plugin_api_version(), 1, "the stand-in exports no mark of a newer QEMU");
    assert_ne!(handles.uffd_source(), UffdSource::None);
    handles.uffd().unwrap();
    handles.pagemap().unwrap();
    let own = fs::read_to_string(format!("/proc/{}/maps", guest.pid())).unwrap();
    assert_eq!(handles.maps().unwrap(), MemoryMaps::from_read(own.as_bytes()).unwrap());
    assert_eq!(handles.find_mapping(&guest.memory).unwrap(), Some(guest.shared_address));
    let ram = handles.ram("ram").unwrap().unwrap();
    assert_eq!(ram.inode().unwrap(), guest.memory.inode().unwrap());

    guest.act('o', 's', &[0]);
    let error = handles.find_mapping(&guest.memory).unwrap_err();
    assert!(error.to_string().contains("mapped it twice"), "{error}");
}

#[test]
fn any_number_of_clients_leaves_nothing_behind() {
    let guest = StandIn::start(1, 1);
    let before = (open_files(&guest), threads(&guest));
    for pass in 0..200 {
        match pass % 4 {
            0 => drop(guest.handles()),
            1 => drop(client(&guest)),
            2 => client(&guest).write_all(&HELLO[..5]).unwrap(),
            // Gone before the answer is there.
            _ => client(&guest).write_all(HELLO).unwrap(),
        }
    }
    guest.handles();
    // The plugin hangs up a moment after the client has the answer.
    let deadline = Instant::now() + BOUND;
    while (open_files(&guest), threads(&guest)) != before && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!((open_files(&guest), threads(&guest)), before);
}

#[test]
fn wrong_greetings_are_refused_with_a_reason_and_without_descriptors() {
    let guest = StandIn::start(1, 1);
    let mut unknown = *HELLO;
    unknown[0] = b'X';
    let mut newer = *HELLO;
    newer[8] = 200;
    for (hello, status) in [(unknown, 1), (newer, 2)] {
        let mut stream = client(&guest);
        stream.write_all(&hello).unwrap();
        let reply = answer(stream);
        assert_eq!(reply.len(), REPLY_LEN);
        assert_eq!(&reply[..8], b"STILLPT!");
        assert_eq!(reply[12], status);
        assert!(reply[16..].iter().all(|byte| *byte == 0), "the reply holds nothing else");
    }
    guest.handles();
}

#[test]
fn short_and_endless_greetings_do_not_keep_the_others_waiting() {
    let guest = StandIn::start(1, 1);
    let mut silent = client(&guest);
    silent.write_all(&HELLO[..15]).unwrap();
    let mut endless = client(&guest);
    endless.write_all(&[b'X'; 1 << 16]).unwrap();
    let started = Instant::now();
    guest.handles();
    assert!(started.elapsed() < BOUND, "{:?}", started.elapsed());
    assert_eq!(answer(silent), b"");
}

#[test]
fn a_greeting_in_pieces_is_understood() {
    let guest = StandIn::start(1, 1);
    let mut stream = client(&guest);
    for byte in HELLO {
        stream.write_all(&[*byte]).unwrap();
    }
    let reply = answer(stream);
    assert_eq!((reply.len(), reply[12]), (REPLY_LEN, 0));
}

#[test]
fn the_socket_is_for_its_owner_only() {
    let guest = StandIn::start(1, 1);
    let mode = fs::metadata(&guest.socket).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
}

#[test]
fn an_abandoned_socket_is_replaced_and_one_in_use_is_not() {
    let dir = TempDir::new().unwrap();
    drop(UnixListener::bind(dir.path().join("plugin.sock")).unwrap());
    let guest = StandIn::start_in(dir, 1, 1);
    guest.handles();
    assert_eq!(StandIn::try_socket(&guest.socket), "failed 1", "in use");
    guest.handles();
    let plain = guest.dir().join("plain");
    fs::write(&plain, "precious").unwrap();
    assert_eq!(StandIn::try_socket(&plain), "failed 1", "not a socket");
    assert_eq!(fs::read_to_string(&plain).unwrap(), "precious");
}

#[test]
fn the_plugin_starts_once_and_says_why_not() {
    let mut guest = StandIn::start(1, 1);
    assert_eq!(guest.tell("i p"), "1");
    guest.handles();
    assert_eq!(StandIn::try_socket(Path::new("/nonexistent/plugin.sock")), "failed 1");
    assert_eq!(StandIn::try_socket(Path::new(&"x".repeat(200))), "failed 1");
}

#[test]
fn missing_plugin_is_an_error_after_the_timeout() {
    let started = Instant::now();
    let error =
        PluginHandles::connect(Path::new("/nonexistent/plugin.sock"), Duration::from_millis(50))
            .unwrap_err();
    assert!(started.elapsed() >= Duration::from_millis(50));
    assert!(error.is_retryable() && error.to_string().contains("-plugin file="), "{error}");
}

#[test]
fn a_socket_that_comes_late_is_waited_for() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("plugin.sock");
    let waiting = {
        let path = path.clone();
        std::thread::spawn(move || PluginHandles::connect(&path, TIMEOUT).map(drop))
    };
    let _guest = StandIn::start_in(dir, 1, 1);
    waiting.join().unwrap().unwrap();
}

/// Answers one client with `reply` and hangs up.
fn impostor(reply: Vec<u8>) -> (TempDir, PathBuf, JoinHandle<()>) {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("plugin.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let thread = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.read_exact(&mut [0; HELLO.len()]).unwrap();
        stream.write_all(&reply).unwrap();
    });
    (dir, path, thread)
}

fn reply(change: impl Fn(&mut [u8])) -> Vec<u8> {
    let mut bytes = vec![0; REPLY_LEN];
    bytes[..8].copy_from_slice(b"STILLPT!");
    bytes[8] = 1;
    change(&mut bytes);
    bytes
}

#[test]
fn answers_that_are_not_the_plugins_are_refused() {
    type Expected = fn(&TrackerError) -> bool;
    let cases: [(Vec<u8>, Expected); 8] = [
        (vec![], |error| matches!(error, TrackerError::Greeting { .. })),
        (b"HTTP/1.1 400".to_vec(), |error| matches!(error, TrackerError::Greeting { .. })),
        (vec![0xff; REPLY_LEN], |error| matches!(error, TrackerError::NotThePlugin { .. })),
        (reply(|bytes| bytes[12] = 77), |error| matches!(error, TrackerError::NotThePlugin { .. })),
        (reply(|bytes| bytes[12] = 1), |error| matches!(error, TrackerError::NotThePlugin { .. })),
        (reply(|bytes| bytes[56] = 0b11), |error| {
            matches!(error, TrackerError::NotThePlugin { .. })
        }),
        (reply(|bytes| bytes[8] = 9), |error| {
            matches!(error, TrackerError::Version { plugin: 9, ours: 1, .. })
        }),
        (reply(|bytes| bytes[12] = 2), |error| matches!(error, TrackerError::Version { .. })),
    ];
    for (bytes, expected) in cases {
        let (_dir, path, thread) = impostor(bytes.clone());
        let error = PluginHandles::connect(&path, TIMEOUT).unwrap_err();
        assert!(expected(&error), "{bytes:?}: {error:?}");
        thread.join().unwrap();
    }
}

#[test]
fn descriptors_that_were_not_announced_are_refused() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("plugin.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let thread = std::thread::spawn(move || {
        let (stream, _) = listener.accept().unwrap();
        let bytes = reply(|bytes| bytes[56] = 0b1);
        let fds = [stream.as_raw_fd(), stream.as_raw_fd()];
        let attached = [ControlMessage::ScmRights(&fds)];
        let parts = [IoSlice::new(&bytes)];
        sendmsg::<()>(stream.as_raw_fd(), &parts, &attached, MsgFlags::empty(), None).unwrap();
    });
    let error = PluginHandles::connect(&path, TIMEOUT).unwrap_err();
    assert!(matches!(error, TrackerError::NotThePlugin { .. }), "{error:?}");
    thread.join().unwrap();
}

#[test]
fn a_plugin_without_descriptors_names_what_is_missing() {
    let bytes = reply(|bytes| {
        bytes[36] = libc::EPERM as u8;
        bytes[52] = libc::EBADF as u8;
    });
    let (_dir, path, thread) = impostor(bytes);
    let handles = PluginHandles::connect(&path, TIMEOUT).unwrap();
    thread.join().unwrap();
    assert_eq!(handles.uffd_source(), UffdSource::None);
    assert!(!handles.can_fill());
    let error = handles.uffd().unwrap_err();
    assert!(
        error.to_string().contains("userfaultfd") && error.to_string().contains("Linux 6.7"),
        "{error}"
    );
    let error = handles.ram("ram").unwrap_err();
    assert!(error.to_string().contains("ramfd="), "{error}");
}
