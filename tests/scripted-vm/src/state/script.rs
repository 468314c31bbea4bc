//! What is to happen at a command.

use std::sync::mpsc;
use std::time::Duration;

use tokio::sync::watch;

use crate::State;

/// What happens at a command instead of, before or after what QEMU would do.
pub enum Act {
    /// It is refused with these words.
    Refuse(String),
    /// It is not carried out and never answered; later commands are.
    Silence,
    /// It is carried out, and its answer is lost; later commands are answered.
    LoseAnswer,
    /// It is carried out and answered later. The whole monitor waits.
    Late(Duration),
    /// The connection ends before it is carried out.
    Cut,
    /// The connection ends after it was carried out.
    CutAfter,
    /// This happens first: another client's action.
    Before(Box<dyn FnOnce(&mut State) + Send>),
    /// This happens right after its answer.
    After(Box<dyn FnOnce(&mut State) + Send>),
    /// See [`Gate`].
    Hold(Hold),
}

impl Act {
    /// [`Act::Before`], without the box.
    pub fn before(act: impl FnOnce(&mut State) + Send + 'static) -> Self {
        Self::Before(Box::new(act))
    }

    /// [`Act::After`], without the box.
    pub fn after(act: impl FnOnce(&mut State) + Send + 'static) -> Self {
        Self::After(Box::new(act))
    }
}

/// The monitor's side of a [`Gate`].
pub struct Hold {
    pub(crate) is_after: bool,
    reached: watch::Sender<bool>,
    open: mpsc::Receiver<()>,
}

impl Hold {
    /// Waits until the gate is opened or dropped.
    pub(crate) fn wait(&self) {
        let _ = self.reached.send(true);
        let _ = self.open.recv();
    }
}

/// A command that waits, and its whole monitor with it, until this is opened or dropped.
pub struct Gate {
    reached: watch::Receiver<bool>,
    _open: mpsc::SyncSender<()>,
}

impl Gate {
    pub(crate) fn before() -> (Act, Self) {
        Self::pair(false)
    }

    pub(crate) fn after() -> (Act, Self) {
        Self::pair(true)
    }

    fn pair(is_after: bool) -> (Act, Self) {
        let (reached, is_reached) = watch::channel(false);
        let (open, is_open) = mpsc::sync_channel(1);
        let hold = Hold { is_after, reached, open: is_open };
        (Act::Hold(hold), Self { reached: is_reached, _open: open })
    }

    /// Resolves when the command waits. Never, if it is not sent.
    pub async fn reached(&mut self) {
        if self.reached.wait_for(|reached| *reached).await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// Lets the command be carried out, or answered.
    pub fn open(self) {}
}

/// Rules by command; the first that fits counts, once.
#[derive(Default)]
pub(crate) struct Script {
    rules: Vec<(String, usize, Act)>,
}

impl Script {
    pub(crate) fn add(&mut self, command: &str, skip: usize, act: Act) {
        self.rules.push((command.to_owned(), skip, act));
    }

    pub(crate) fn take(&mut self, command: &str) -> Option<Act> {
        let at = self.rules.iter().position(|(name, ..)| name == command)?;
        if self.rules[at].1 > 0 {
            self.rules[at].1 -= 1;
            return None;
        }
        Some(self.rules.remove(at).2)
    }

    pub(crate) fn clear(&mut self) {
        self.rules.clear();
    }
}
