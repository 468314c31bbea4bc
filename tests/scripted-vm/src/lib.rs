//! A QEMU for tests that is a script: a monitor, an NBD server and a migration stream, in
//! milliseconds, on threads of the test's own process.
//!
//! It keeps the state that a checkpoint meets: run state, block graph, bitmaps, transactions, jobs,
//! exports, objects, descriptors and a migration with its events. What it answers agrees with QEMU
//! 7.2 and 10.0 in all that our client reads; a test of whole VMs holds the same conversation with
//! all three. Each command can be made to fail, hang, come late, lose its answer or cut the
//! connection, and any other client's action can come before or after it: see [`Act`].
//!
//! [`Body`] is the process that has the VM's memory, with the plugin in it, so that a tracker and
//! whatever looks into `/proc` find what they would find beside a QEMU.
//!
//! A helper that is killed is modelled by [`ScriptedQemu::sever`]: all its connections end, as they
//! do with its process. Then its task is dropped, whose guards have no connection any more.
//!
//! # Example
//!
//! ```
//! use scripted_vm::{Ram, ScriptedQemu, Version};
//! use serde_json::json;
//!
//! # fn main() -> Result<(), String> {
//! let qemu = ScriptedQemu::new(Version::V10_0, Ram::plain(256));
//! assert_eq!(qemu.execute("query-status", &json!({}))?["status"], "running");
//! qemu.execute("stop", &json!({}))?;
//! assert_eq!(qemu.execute("query-status", &json!({}))?["status"], "paused");
//! # Ok(())
//! # }
//! ```

mod body;
mod monitor;
mod nbd;
mod program;
mod ram;
mod state;
mod stream;

use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde_json::Value;

pub use body::Body;
pub use program::{Program, Started};
pub use ram::{Ram, RamPart};
pub use state::State;
pub use state::blocks::NbdFault;
pub use state::migration::StreamFault;
pub use state::script::{Act, Gate};
pub use stream::device_state;

/// What the state is guarded by; every command holds it.
type Shared = Arc<Mutex<State>>;

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Starts what a command has given work to.
fn start_threads(shared: &Shared) {
    state::migration::start_if_due(shared);
    state::incoming::start_if_due(shared);
    let mut state = lock(shared);
    if std::mem::take(&mut state.serves_nbd)
        && let Some(listener) = state.blocks.listener()
    {
        nbd::serve(shared.clone(), listener);
    }
}

/// Which QEMU is played.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Version {
    /// 10 of 10.0.2.
    pub major: u32,
    /// 0 of 10.0.2.
    pub minor: u32,
    /// 2 of 10.0.2.
    pub micro: u32,
}

impl Version {
    /// The older of the two that are tested.
    pub const V7_2: Self = Self { major: 7, minor: 2, micro: 22 };
    /// The first of which our tracker needs no look into its heap, and without live streams of a
    /// TCG guest, or a command that activates disks.
    pub const V8_2: Self = Self { major: 8, minor: 2, micro: 0 };
    /// The newer.
    pub const V10_0: Self = Self { major: 10, minor: 0, micro: 2 };

    /// The default machine type, without the alias.
    pub fn machine_type(self) -> String {
        format!("pc-q35-{}.{}", self.major, self.minor)
    }
}

/// The scripted QEMU; clones are the same one.
#[derive(Clone)]
pub struct ScriptedQemu {
    shared: Shared,
}

impl ScriptedQemu {
    /// One whose guest runs, with this memory and no disk.
    pub fn new(version: Version, ram: Ram) -> Self {
        Self { shared: Arc::new(Mutex::new(State::new(version, ram))) }
    }

    /// `quit` ends this process.
    pub fn runs_in(&self, body: &Body) {
        self.with(|state| state.process = Some(Arc::clone(body.process())));
    }

    /// A monitor on one end of a socket pair; the other end is returned.
    pub fn monitor(&self) -> UnixStream {
        let (ours, theirs) = UnixStream::pair().expect("a socket pair");
        monitor::serve(self.shared.clone(), ours);
        theirs
    }

    /// A monitor that listens at `path`, for one client after another. The socket looks as if it
    /// had been made long ago, so that no client waits before it connects.
    pub fn listen(&self, path: &Path) -> io::Result<()> {
        let listener = UnixListener::bind(path)?;
        let past = rustix::fs::Timespec { tv_sec: 1_000_000_000, tv_nsec: 0 };
        let times = rustix::fs::Timestamps { last_access: past, last_modification: past };
        rustix::fs::utimensat(rustix::fs::CWD, path, &times, rustix::fs::AtFlags::empty())?;
        let shared = self.shared.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                monitor::serve(shared.clone(), stream);
            }
        });
        Ok(())
    }

    /// Looks at the state, or changes it as no command could.
    pub fn with<T>(&self, act: impl FnOnce(&mut State) -> T) -> T {
        act(&mut lock(&self.shared))
    }

    /// Another client's command, carried out at once. Whatever is scripted does not count for it.
    ///
    /// # Errors
    /// QEMU's words.
    pub fn execute(&self, command: &str, arguments: &Value) -> Result<Value, String> {
        let done = self.with(|state| state.execute(command, arguments, None));
        start_threads(&self.shared);
        done.map_err(|refusal| refusal.description)
    }

    /// At the next `command` of a client under test this happens.
    pub fn on(&self, command: &str, act: Act) {
        self.on_nth(command, 0, act);
    }

    /// The same after so many of them.
    pub fn on_nth(&self, command: &str, skip: usize, act: Act) {
        self.with(|state| state.script.add(command, skip, act));
    }

    /// The next `command` is refused with these words.
    pub fn refuse(&self, command: &str, why: &str) {
        self.on(command, Act::Refuse(why.to_owned()));
    }

    /// The next `command` waits, not begun yet, until the gate is opened.
    pub fn hold(&self, command: &str) -> Gate {
        let (act, gate) = Gate::before();
        self.on(command, act);
        gate
    }

    /// The next `command` is carried out; its answer waits until the gate is opened.
    pub fn hold_answer(&self, command: &str) -> Gate {
        let (act, gate) = Gate::after();
        self.on(command, act);
        gate
    }

    /// The same after so many of them; `is_after`: it is carried out first.
    pub fn hold_nth(&self, command: &str, skip: usize, is_after: bool) -> Gate {
        let (act, gate) = if is_after { Gate::after() } else { Gate::before() };
        self.on_nth(command, skip, act);
        gate
    }

    /// What is scripted and has not happened yet does not happen.
    pub fn forget_script(&self) {
        self.with(|state| state.script.clear());
    }

    /// Ends all connections of clients, as those of a killed process end, and forgets the script.
    /// Commands that wait are not carried out.
    pub fn sever(&self) {
        self.with(|state| {
            state.script.clear();
            state.disconnect();
        });
    }

    /// Its process has ended: connections end, and no other client is served.
    pub fn end(&self) {
        self.with(|state| state.has_ended = true);
        self.sever();
    }

    /// How often clients under test have sent `command`.
    pub fn heard(&self, command: &str) -> usize {
        self.with(|state| state.log.iter().filter(|heard| *heard == command).count())
    }

    /// The commands of clients under test that are no questions, oldest first.
    pub fn orders(&self) -> Vec<String> {
        let asks =
            |command: &String| command.starts_with("query-") || command.starts_with("qom-list");
        self.with(|state| state.log.iter().filter(|heard| !asks(heard)).cloned().collect())
    }
}
