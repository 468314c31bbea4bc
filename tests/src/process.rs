//! Processes of a test: found, watched and ended by number, never by name.

pub use nix::unistd::Pid;

use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use procfs::process::{Process, all_processes};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

/// Polls until `done`, at most `timeout`; false when it never was.
pub fn wait_until(timeout: Duration, mut done: impl FnMut() -> bool) -> bool {
    let end = Instant::now() + timeout;
    loop {
        if done() {
            return true;
        }
        if Instant::now() > end {
            return false;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A process whose threads have all ended does not run, even if its parent has not yet waited for
/// it. The state of the first thread is not enough: while another thread is still exiting, the
/// process holds its files and locks.
pub fn is_running(pid: Pid) -> bool {
    let tasks = Process::new(pid.as_raw()).and_then(|process| process.tasks());
    let mut states = tasks.into_iter().flatten().flatten().filter_map(|task| task.stat().ok());
    states.any(|stat| !matches!(stat.state, 'Z' | 'X'))
}

/// Whether the process has `path` on its command line: the kernel may have reused the pid for
/// another process.
pub(crate) fn is_ours(pid: Pid, path: &Path) -> bool {
    let words = Process::new(pid.as_raw()).and_then(|process| process.cmdline());
    words.unwrap_or_default().iter().any(|word| word.contains(&path.display().to_string()))
}

/// Whether it works in one of `places`, or has one on its command line.
pub(crate) fn belongs_to(pid: Pid, places: &[&Path]) -> bool {
    let works_in = Process::new(pid.as_raw()).and_then(|process| process.cwd()).unwrap_or_default();
    places.iter().any(|place| works_in.starts_with(place) || is_ours(pid, place))
}

/// Running QEMUs that belong to a directory.
pub fn qemus_below(directory: &Path) -> Vec<Pid> {
    let all = all_processes().expect("a kernel that tells").flatten();
    let is_qemu =
        |process: &Process| process.stat().is_ok_and(|stat| stat.comm.starts_with("qemu-system"));
    all.filter(is_qemu)
        .map(|process| Pid::from_raw(process.pid))
        .filter(|pid| is_running(*pid) && belongs_to(*pid, &[directory]))
        .collect()
}

/// The process that started it, if that still runs.
pub(crate) fn parent(pid: Pid) -> Option<Pid> {
    let stat = Process::new(pid.as_raw()).and_then(|process| process.stat()).ok()?;
    Some(Pid::from_raw(stat.ppid))
}

/// Processor time that it has used.
pub fn processor_time(pid: Pid) -> Duration {
    let stat = Process::new(pid.as_raw()).and_then(|process| process.stat());
    // The kernel counts hundredths of a second for user space, whatever its own clock does.
    Duration::from_millis(stat.map_or(0, |stat| (stat.utime + stat.stime) * 10))
}

/// The most memory that it has ever held.
pub(crate) fn peak_bytes(pid: Pid) -> Option<u64> {
    Some(Process::new(pid.as_raw()).ok()?.status().ok()?.vmhwm? << 10)
}

/// The process that listens at a socket.
pub(crate) fn listener(socket: &Path) -> Option<Pid> {
    let stream = UnixStream::connect(socket).ok()?;
    let peer = getsockopt(&stream, PeerCredentials).ok()?;
    Some(Pid::from_raw(peer.pid()))
}

/// Ends it as a crash would, and waits until it is gone.
pub fn kill_hard(pid: Pid) {
    // It may be gone already.
    let _ = kill(pid, Signal::SIGKILL);
    let gone = wait_until(Duration::from_secs(20), || !is_running(pid));
    assert!(gone || std::thread::panicking(), "process {pid} does not end");
}

/// Stops the process for as long as the value lives.
pub fn stop_and_continue(pid: Pid) -> impl Drop {
    struct Stopped(Pid);
    impl Drop for Stopped {
        fn drop(&mut self) {
            let _ = kill(self.0, Signal::SIGCONT);
        }
    }
    kill(pid, Signal::SIGSTOP).expect("a process of the test");
    Stopped(pid)
}

/// Fails a test that cannot do its work without root, with the way to run it.
///
/// # Panics
/// For any other user.
pub fn assert_root(what: &str) {
    let is_root = nix::unistd::geteuid().is_root();
    assert!(is_root, "{what} needs root: sudo -E env PATH=$PATH cargo test --workspace -- TEST");
}
