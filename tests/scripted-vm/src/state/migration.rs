//! A migration to a descriptor: its states, its events and its thread.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};

use crate::ram::PAGE;
use crate::state::{Refusal, Reply};
use crate::{Shared, State, lock, stream};

/// How long the thread sleeps between two looks at what clients have ordered.
const LOOK: Duration = Duration::from_micros(200);

/// A parameter that is there only when it is set.
const BITMAPS: &str = "block-bitmap-mapping";

/// What is wrong with the next stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StreamFault {
    /// It ends after so many bytes, and QEMU says that writing failed.
    CutAfter(usize),
    /// This byte is another.
    Damaged(usize),
    /// This page of the first block never comes.
    Lacks(usize),
    /// The guest writes faster than the stream is read: it never gets to the switch-over.
    NeverConverges,
}

/// The migration that is under way, or was last.
#[derive(Default)]
pub struct Migration {
    /// QEMU's word; empty if there was none.
    pub status: String,
    /// Why it failed.
    pub error: Option<String>,
    /// What is wrong with the next stream.
    pub fault: Option<StreamFault>,
    /// Pages of (block, page) that the guest writes between the first pass and the last.
    pub written_meanwhile: Vec<(usize, usize, u8)>,
    passes: u64,
    pages: u64,
    /// Whether the guest ran before the switch-over.
    ran: bool,
    may_continue: bool,
    /// Given by `migrate` and not yet taken by a thread.
    socket: Option<UnixStream>,
    /// Which migration this is: a thread of an earlier one stops.
    number: Arc<()>,
}

impl Migration {
    /// Whether one is under way.
    pub fn is_running(&self) -> bool {
        !matches!(self.status.as_str(), "" | "none" | "completed" | "failed" | "cancelled")
    }
}

impl State {
    /// As QEMU changes it, with the event if that is on.
    pub fn set_migration(&mut self, status: &str) {
        status.clone_into(&mut self.migration.status);
        if self.capabilities["events"] {
            self.event("MIGRATION", json!({ "status": status }));
        }
    }

    pub(crate) fn migrate_command(&mut self, command: &str, arguments: &Value) -> Reply {
        match command {
            "migrate" => return self.migrate(arguments["uri"].as_str().unwrap_or_default()),
            "migrate_cancel" => self.cancel(),
            "migrate-continue" if self.migration.status == "pre-switchover" => {
                self.migration.may_continue = true;
            }
            "migrate-continue" => {
                let status = match self.migration.status.as_str() {
                    "" => "none",
                    status => status,
                };
                let why = format!("Migration not in expected state: {status}");
                return Err(Refusal::generic(why));
            }
            "migrate-set-capabilities" => return self.set_capabilities(&arguments["capabilities"]),
            "migrate-set-parameters" => {
                let given = arguments.as_object().cloned().unwrap_or_default();
                let is_known =
                    |name: &String| name == BITMAPS || self.parameters.contains_key(name);
                if let Some(unknown) = given.keys().find(|name| !is_known(name)) {
                    return Err(Refusal::generic(format!("Parameter '{unknown}' is unexpected")));
                }
                self.parameters.extend(given);
                // QEMU does not list it where there is none.
                if self.parameters.get(BITMAPS) == Some(&json!([])) {
                    self.parameters.remove(BITMAPS);
                }
            }
            _ => return Err(unknown(command)),
        }
        Ok(json!({}))
    }

    pub(crate) fn query_migrate(&self) -> Value {
        let mut answer = json!({});
        if !self.blockers.is_empty() {
            answer["blocked-reasons"] = json!(self.blockers);
        }
        if self.migration.status.is_empty() {
            return answer;
        }
        answer["status"] = json!(self.migration.status);
        if let Some(error) = &self.migration.error {
            answer["error-desc"] = json!(error);
        }
        let total: u64 = self.ram.parts.iter().map(|part| part.bytes).sum();
        answer["ram"] = json!({
            "total": total, "remaining": 0, "transferred": self.migration.pages * PAGE as u64,
            "normal": self.migration.pages, "duplicate": 0, "page-size": PAGE, "mbps": 800.0,
            "dirty-sync-count": self.migration.passes, "dirty-pages-rate": 50_000,
        });
        answer
    }

    fn set_capabilities(&mut self, list: &Value) -> Reply {
        if self.migration.is_running() {
            return Err(Refusal::generic("There's a migration process in progress"));
        }
        for row in list.as_array().into_iter().flatten() {
            let name = row["capability"].as_str().unwrap_or_default();
            match self.capabilities.get_mut(name) {
                Some(state) => *state = row["state"] == true,
                None => {
                    let why = format!("Parameter 'capability' does not accept value '{name}'");
                    return Err(Refusal::generic(why));
                }
            }
        }
        Ok(json!({}))
    }

    fn migrate(&mut self, uri: &str) -> Reply {
        if self.migration.is_running() {
            return Err(Refusal::generic("There's a migration process in progress"));
        }
        if let Some(why) = self.blockers.first() {
            return Err(Refusal::generic(why));
        }
        if self.run_state == "postmigrate" {
            return Err(Refusal::generic("Can't migrate the vm that was already migrated"));
        }
        let socket = match self.open_target(uri) {
            Ok(socket) => socket,
            Err(why) => {
                let failed = ("failed".into(), Some(why.clone()));
                (self.migration.status, self.migration.error) = failed;
                return Err(Refusal::generic(why));
            }
        };
        let before = std::mem::take(&mut self.migration);
        self.migration.fault = before.fault;
        self.migration.written_meanwhile = before.written_meanwhile;
        self.migration.socket = Some(socket);
        self.set_migration("setup");
        Ok(json!({}))
    }

    fn open_target(&mut self, uri: &str) -> Result<UnixStream, String> {
        if let Some(path) = uri.strip_prefix("unix:") {
            let connected = UnixStream::connect(path);
            return connected.map_err(|error| format!("Failed to connect to '{path}': {error}"));
        }
        let name = uri.strip_prefix("fd:").unwrap_or_default();
        let given = self.fds.remove(name).map(UnixStream::from);
        given.ok_or_else(|| format!("File descriptor named '{name}' has not been found"))
    }

    fn cancel(&mut self) {
        if self.migration.is_running() {
            self.set_migration("cancelling");
            // The thread of this migration finds that it is none any more.
            self.migration.number = Arc::default();
            self.resume_after_migration();
            self.set_migration("cancelled");
        }
    }

    fn fail(&mut self, why: &str) {
        self.migration.error = Some(why.to_owned());
        self.resume_after_migration();
        self.set_migration("failed");
    }

    fn resume_after_migration(&mut self) {
        if self.run_state == "finish-migrate" {
            if self.migration.ran {
                self.cont();
            } else {
                self.enter("paused");
            }
        }
        self.blocks.is_active = true;
    }

    fn all_pages(&self) -> Vec<(usize, usize)> {
        let lacks = match self.migration.fault {
            Some(StreamFault::Lacks(page)) => Some((0, page)),
            _ => None,
        };
        let pages = self.ram.parts.iter().enumerate().flat_map(|(part, block)| {
            (0..usize::try_from(block.bytes).expect("small") / PAGE).map(move |page| (part, page))
        });
        pages.filter(|page| Some(*page) != lacks).collect()
    }
}

pub(crate) fn unknown(command: &str) -> Refusal {
    let description = format!("The command {command} has not been found");
    Refusal { class: "CommandNotFound", description }
}

/// Starts the thread of a migration that was just ordered.
pub(crate) fn start_if_due(shared: &Shared) {
    let mut state = lock(shared);
    if let Some(socket) = state.migration.socket.take() {
        let number = Arc::clone(&state.migration.number);
        let sender = Sender { shared: shared.clone(), socket, number, sent: 0 };
        std::thread::spawn(move || sender.run());
    }
}

struct Sender {
    shared: Shared,
    socket: UnixStream,
    number: Arc<()>,
    sent: usize,
}

/// Why the thread ends early.
enum End {
    Cancelled,
    Broken(String),
}

impl Sender {
    fn run(mut self) {
        let ended = self.send_all();
        let why = match ended {
            Ok(()) | Err(End::Cancelled) => return,
            Err(End::Broken(why)) => why,
        };
        let _ = self.step(|state| state.fail(&why));
    }

    /// Does something to the state, unless this migration was cancelled.
    fn step<T>(&self, act: impl FnOnce(&mut State) -> T) -> Result<T, End> {
        let mut state = lock(&self.shared);
        if Arc::ptr_eq(&state.migration.number, &self.number) {
            Ok(act(&mut state))
        } else {
            Err(End::Cancelled)
        }
    }

    /// While the state is not held: the reader may be slow.
    fn write(&mut self, mut bytes: Vec<u8>) -> Result<(), End> {
        let fault = self.step(|state| state.migration.fault)?;
        let place = |at: usize| at.checked_sub(self.sent).filter(|at| *at < bytes.len());
        match fault {
            Some(StreamFault::Damaged(at)) => {
                if let Some(at) = place(at) {
                    bytes[at] ^= 0xff;
                }
            }
            Some(StreamFault::CutAfter(at)) => {
                if let Some(at) = place(at) {
                    let _ = self.socket.write_all(&bytes[..at]);
                    let _ = self.socket.shutdown(std::net::Shutdown::Both);
                    return Err(End::Broken("Unable to write to socket: Broken pipe".into()));
                }
            }
            _ => {}
        }
        self.sent += bytes.len();
        let written = self.socket.write_all(&bytes);
        written.map_err(|error| End::Broken(format!("Unable to write to socket: {error}")))
    }

    fn send_all(&mut self) -> Result<(), End> {
        let is_snapshot = self.step(|state| state.capabilities["background-snapshot"])?;
        let head = self.step(|state| {
            state.set_migration("active");
            stream::head(&state.version.machine_type(), &state.ram)
        })?;
        self.write(head)?;
        if is_snapshot {
            return self.send_snapshot();
        }
        let first = self.step(|state| {
            state.migration.passes = 1;
            let pages = state.all_pages();
            state.migration.pages += pages.len() as u64;
            stream::pass(&state.ram, &pages, false)
        })?;
        self.write(first)?;
        self.wait_until_small()?;
        let run_state = self.switch_over()?;
        let rest = self.step(|state| {
            state.set_migration("device");
            let written = std::mem::take(&mut state.migration.written_meanwhile);
            let pages: Vec<_> = written.iter().map(|(part, page, _)| (*part, *page)).collect();
            [stream::pass(&state.ram, &pages, true), stream::tail(&run_state)].concat()
        })?;
        self.write(rest)?;
        self.step(|state| {
            state.blocks.is_active = false;
            state.set_migration("completed");
            state.enter("postmigrate");
        })
    }

    fn wait_until_small(&self) -> Result<(), End> {
        loop {
            let is_small = self.step(|state| {
                state.migration.passes += 1;
                state.migration.fault != Some(StreamFault::NeverConverges)
            })?;
            if is_small {
                return Ok(());
            }
            if self.reader_is_gone() {
                return Err(End::Broken("Unable to write to socket: Broken pipe".into()));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn reader_is_gone(&self) -> bool {
        let mut probe = [0];
        self.socket.set_nonblocking(true).expect("a socket");
        let got = rustix::net::recv(&self.socket, &mut probe, rustix::net::RecvFlags::PEEK);
        self.socket.set_nonblocking(false).expect("a socket");
        got.is_ok_and(|(_, count)| count == 0)
    }

    /// Stops the guest, and waits for the word to continue if that is wanted. Returns the run state
    /// before.
    fn switch_over(&self) -> Result<String, End> {
        let (run_state, waits) = self.step(|state| {
            for (part, page, byte) in state.migration.written_meanwhile.clone() {
                state.ram.fill(part, page, byte);
            }
            let before = state.run_state.clone();
            state.migration.ran = state.is_running();
            if state.is_running() {
                state.enter("finish-migrate");
                state.event("STOP", Value::Null);
            } else {
                state.enter("finish-migrate");
            }
            let waits = state.capabilities["pause-before-switchover"];
            if waits {
                state.set_migration("pre-switchover");
            }
            (before, waits)
        })?;
        while waits && !self.step(|state| state.migration.may_continue)? {
            std::thread::sleep(LOOK);
        }
        Ok(run_state)
    }

    /// The guest stands and is let run when all is protected; memory comes as it was then.
    fn send_snapshot(&mut self) -> Result<(), End> {
        let all = self.step(|state| {
            let pages = state.all_pages();
            state.migration.pages += pages.len() as u64;
            let memory = stream::pass(&state.ram, &pages, true);
            [memory, stream::tail("running")].concat()
        })?;
        self.write(all)?;
        self.step(|state| state.set_migration("completed"))
    }
}
