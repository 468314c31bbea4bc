//! What a person reads: results on stdout; progress as bars on stderr when it is a terminal,
//! nothing otherwise.

use anyhow::{Context, Result};
use engine::progress::{self, Advance, Update};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::io::{Error, ErrorKind, IsTerminal, Write};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// Why stdout was not written, at the first time.
static FAILURE: OnceLock<Error> = OnceLock::new();

/// Prints on stdout. What cannot be printed is an error of [`finish`], when the command has done
/// all that it does.
macro_rules! out {
    ($($text:tt)*) => { $crate::terminal::write(format_args!($($text)*)) };
}
pub(crate) use out;

pub(crate) fn write(text: std::fmt::Arguments<'_>) {
    let mut stdout = std::io::stdout().lock();
    if let Err(error) =
        stdout.write_fmt(text).and_then(|()| stdout.write_all(b"\n")).and_then(|()| stdout.flush())
    {
        // `finish` reports it.
        let _ = FAILURE.set(error);
    }
}

pub(crate) fn print_json(value: &serde_json::Value) -> Result<()> {
    out!("{}", serde_json::to_string_pretty(value).context("encoding JSON")?);
    Ok(())
}

/// At a command's end: whether all that it printed was written. A reader that has closed stdout
/// (`| head`) is no failure.
///
/// # Errors
/// When stdout was not written, as on a full disk.
pub(crate) fn finish() -> anyhow::Result<()> {
    match FAILURE.get() {
        Some(error) if error.kind() != ErrorKind::BrokenPipe => Err(not_written(error)),
        _ => Ok(()),
    }
}

pub(crate) fn not_written(error: &Error) -> anyhow::Error {
    anyhow::anyhow!(
        "the result could not be written on stdout ({error}); what the command does is done"
    )
}

/// Shown only for what takes this long.
const SHOW_AFTER: Duration = Duration::from_secs(1);

/// Shows the work of a command: a bar for each piece of it.
pub(crate) struct Terminal;

impl progress::Progress for Terminal {
    fn begin(&self, what: &str, total: u64) -> Box<dyn Advance> {
        Box::new(Bar::of_bytes(what, total))
    }

    fn note(&self, text: &str) {
        eprintln!("stillpoint: {text}");
    }
}

/// Shows how far a helper is with one request.
pub(crate) fn show_updates() -> impl Fn(&Update) {
    let bar = Bar::of_bytes("checkpoint", 0);
    move |update| bar.set(&update.phase, update.done, update.total)
}

struct Bar {
    bar: ProgressBar,
    begun: Instant,
}

impl Bar {
    fn of_bytes(what: &str, total: u64) -> Self {
        let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::hidden());
        let template =
            "{msg:20} [{bar:32}] {bytes:>10} of {total_bytes:10} {bytes_per_sec:>12} {eta:>4}";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style.progress_chars("=> "));
        }
        bar.set_message(what.to_owned());
        Self { bar, begun: Instant::now() }
    }

    fn set(&self, what: &str, done: u64, total: u64) {
        self.bar.set_message(what.to_owned());
        self.bar.set_length(total);
        self.bar.set_position(done);
        self.show();
    }

    fn show(&self) {
        if self.bar.is_hidden()
            && self.begun.elapsed() > SHOW_AFTER
            && std::io::stderr().is_terminal()
        {
            self.bar.set_draw_target(ProgressDrawTarget::stderr());
        }
    }
}

impl Advance for Bar {
    fn advance(&self, bytes: u64) {
        self.bar.inc(bytes);
        self.show();
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
