//! Plays the QEMUs that the engine starts for a restore or an adoption.

use std::path::Path;
use std::sync::{Arc, Mutex};

use qemu_cmdline::arguments::KeyList;
use scripted_vm::{Gate, Program, ScriptedQemu, Started, Version};
use tokio::sync::{mpsc, oneshot};

type Prepare = Box<dyn FnOnce(&ScriptedQemu) + Send>;

/// Plays each QEMU that is started, one after the other.
pub(crate) struct Player {
    pub program: Arc<Program>,
    prepare: Arc<Mutex<Option<Prepare>>>,
    started: mpsc::Receiver<Started>,
}

impl Player {
    /// `base`: of the runtime directories.
    pub(crate) fn new(base: &Path) -> Self {
        let program = Arc::new(Program::new(base));
        let prepare = Arc::new(Mutex::new(None::<Prepare>));
        let (send, started) = mpsc::channel(16);
        let (played, next) = (Arc::clone(&program), Arc::clone(&prepare));
        std::thread::spawn(move || {
            loop {
                let played = played.play(Version::V10_0, |qemu, words| {
                    add_devices(qemu, words);
                    if let Some(prepare) = next.lock().unwrap().take() {
                        prepare(qemu);
                    }
                });
                if played.is_some_and(|started| send.blocking_send(started).is_err()) {
                    return;
                }
            }
        });
        Self { program, prepare, started }
    }

    /// What shall happen in the next QEMU that is started.
    pub(crate) fn prepare(&self, prepare: impl FnOnce(&ScriptedQemu) + Send + 'static) {
        *self.prepare.lock().unwrap() = Some(Box::new(prepare));
    }

    /// In the next QEMU that is started this command waits, before or after it is carried out.
    pub(crate) fn hold(&self, command: &'static str, is_after: bool) -> oneshot::Receiver<Gate> {
        let (send, gate) = oneshot::channel();
        self.prepare(move |qemu| drop(send.send(qemu.hold_nth(command, 0, is_after))));
        gate
    }

    /// The QEMU that was started, when it is up.
    pub(crate) async fn started(&mut self) -> Started {
        self.started.recv().await.expect("the thread plays")
    }

    /// The same, if one was started.
    pub(crate) fn started_already(&mut self) -> Option<Started> {
        self.started.try_recv().ok()
    }
}

/// Disks and devices of a command line.
fn add_devices(qemu: &ScriptedQemu, words: &[String]) {
    let options = words.windows(2).filter(|pair| pair[0].starts_with('-'));
    for pair in options {
        let keys = KeyList::parse(&pair[1]);
        let key = |name| keys.get(name).unwrap_or_default().to_owned();
        match pair[0].as_str() {
            "-drive" => {
                let path = key("file");
                let content =
                    std::fs::read(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
                let read_only = key("read-only") == "on";
                qemu.with(|state| {
                    state.blocks.add_disk(&key("id"), Path::new(&path), content, read_only);
                });
            }
            "-device" => {
                let kind = pair[1].split(',').next().unwrap_or_default().to_owned();
                let path = format!("/machine/peripheral/{}", key("id"));
                qemu.with(|state| state.devices.push((path, kind)));
            }
            _ => {}
        }
    }
}
