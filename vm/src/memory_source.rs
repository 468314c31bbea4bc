//! Where a checkpoint's memory comes from: the tracker (our plugin inside QEMU), or QEMU's own
//! migration stream.
//!
//! Both write the same checkpoints, so a lineage may change engines at any of them.
//!
//! Of the streams, pre-copy is what is used unless the owner wants another. A background snapshot
//! reads all memory inside the pause before it can protect it (512 MiB: 200 to 650 ms on a busy
//! host, where pre-copy took 8 to 60), and lets a guest that writes wait for us.

use crate::error::{VmError, refused};
use anyhow::Result;
use qmp_bridge::migration::{StreamMode, Support};
use qmp_bridge::qmp::QemuVersion;
use qmp_bridge::quirks;
use qmp_bridge::vm::Accelerator;
use serde::{Deserialize, Serialize};
use strum::{EnumIter, EnumMessage, EnumString, IntoStaticStr};

/// Which engine is wanted; the texts of the values are those of the command line's help.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    Serialize,
    Deserialize,
    EnumIter,
    EnumMessage,
    EnumString,
    IntoStaticStr,
)]
#[serde(rename_all = "kebab-case")]
#[strum(serialize_all = "kebab-case")]
pub enum EngineChoice {
    /// 'tracker' if Stillpoint's plugin is loaded in QEMU, else 'stream'
    #[default]
    Auto,
    /// The kernel records which pages are written; only those are read
    Tracker,
    /// All memory is read by QEMU's migration stream and compared with the last checkpoint
    Stream,
}

/// How the stream engine gets memory of one instant; the texts are for the help, too.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    Serialize,
    Deserialize,
    EnumIter,
    EnumMessage,
    EnumString,
    IntoStaticStr,
)]
#[serde(rename_all = "kebab-case")]
#[strum(serialize_all = "kebab-case")]
pub enum StreamChoice {
    /// 'pre-copy', but 'stopped' if this QEMU loses pages of a running guest (TCG before 9.0)
    #[default]
    Auto,
    /// Memory is read while the guest runs; what changed meanwhile is read in the pause
    PreCopy,
    /// Memory is write-protected in the pause, then read while the guest runs
    BackgroundSnapshot,
    /// The guest is paused while all of its memory is read
    Stopped,
}

/// What a checkpoint is taken with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    /// Written pages, as the plugin and the kernel report them.
    Tracker,
    /// QEMU's migration stream while the guest runs, the rest in the pause.
    PreCopy,
    /// QEMU's migration stream of one instant while the guest runs.
    BackgroundSnapshot,
    /// QEMU's migration stream while the guest is stopped.
    Stopped,
    /// A guest that does not run, read as it stands.
    ProcessMemory,
}

impl Engine {
    /// As results name it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Tracker => "tracker",
            Self::PreCopy => "pre-copy",
            Self::BackgroundSnapshot => "background-snapshot",
            Self::Stopped => "stopped",
            Self::ProcessMemory => "process-memory",
        }
    }

    /// How QEMU is asked for its memory, if it is.
    pub fn mode(self) -> Option<StreamMode> {
        match self {
            Self::Tracker | Self::ProcessMemory => None,
            Self::PreCopy | Self::Stopped => Some(StreamMode::PreCopy),
            Self::BackgroundSnapshot => Some(StreamMode::BackgroundSnapshot),
        }
    }
}

/// An engine, and why this one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chosen {
    /// Where the memory comes from.
    pub engine: Engine,
    /// Why from there.
    pub why: String,
}

/// The tracker if it is wanted or there; `None` if memory has to come by stream. `tracker` says why
/// there is none.
///
/// # Errors
/// Refused if it is wanted and cannot be had.
pub fn choose_tracker(
    wanted: EngineChoice,
    tracker: &Result<(), String>,
) -> Result<Option<Chosen>, VmError> {
    let chosen = |why: &str| Ok(Some(Chosen { engine: Engine::Tracker, why: why.to_owned() }));
    match (wanted, tracker) {
        (EngineChoice::Tracker, Err(why)) => Err(refused(format!(
            "the tracker cannot follow this VM: {why}; use --engine stream, or 'stillpoint adopt'"
        ))
        .into()),
        (EngineChoice::Tracker, Ok(())) => chosen("as wanted"),
        (EngineChoice::Auto, Ok(())) => chosen("the plugin is loaded in this QEMU"),
        (EngineChoice::Auto, Err(_)) | (EngineChoice::Stream, _) => Ok(None),
    }
}

/// `live`: what [`can_pre_copy_live`] says. `has_plugin`: our plugin is loaded in this QEMU, and
/// may have registered its memory. `process_memory`: whether the memory of a guest that does not
/// run can be read from QEMU's process.
///
/// # Errors
/// Refused if none can be had, with the reason of each.
pub fn choose_stream(
    wanted: StreamChoice,
    support: &Support,
    live: Result<(), String>,
    has_plugin: bool,
    process_memory: &Result<(), String>,
) -> Result<Chosen, VmError> {
    let (engine, why) = match support.stopped {
        true => choose_for_stopped_guest(support, has_plugin, process_memory)?,
        false => choose_for_running_guest(wanted, live, has_plugin)?,
    };
    match engine.mode().map(|mode| support.of(mode)) {
        Some(Err(no)) => {
            Err(refused(format!("this QEMU's memory cannot be read by {}: {no}", engine.name()))
                .into())
        }
        _ => Ok(Chosen { engine, why }),
    }
}

/// A guest that does not run is never migrated: QEMU would leave it in another run state, from
/// which only a `cont` leads.
fn choose_for_stopped_guest(
    support: &Support,
    has_plugin: bool,
    process_memory: &Result<(), String>,
) -> Result<(Engine, String)> {
    match process_memory {
        Ok(()) => Ok((Engine::ProcessMemory, "the guest does not run".to_owned())),
        // It leaves the one state in which QEMU allows it.
        Err(_) if !has_plugin && support.background_snapshot.is_ok() => {
            Ok((Engine::BackgroundSnapshot, "the guest is stopped".to_owned()))
        }
        Err(why) => Err(refused(format!(
            "the guest does not run, and its memory cannot be read from QEMU's process: {why}"
        ))),
    }
}

fn choose_for_running_guest(
    wanted: StreamChoice,
    live: Result<(), String>,
    has_plugin: bool,
) -> Result<(Engine, String)> {
    Ok(match wanted {
        StreamChoice::Auto => match live {
            Ok(()) => (Engine::PreCopy, "memory by QEMU's own migration stream".to_owned()),
            Err(loses) => (Engine::Stopped, format!("{loses}, so it is stopped meanwhile")),
        },
        StreamChoice::PreCopy => match live {
            Ok(()) => (Engine::PreCopy, "as wanted".to_owned()),
            Err(loses) => return Err(refused(format!("{loses}; use --stream stopped"))),
        },
        StreamChoice::BackgroundSnapshot if has_plugin => {
            // QEMU would find its memory registered with our userfaultfd, and abort, guest and all
            // (seen with 10.0).
            return Err(refused(
                "a background snapshot is not possible in a QEMU whose memory our plugin tracks; use --stream pre-copy",
            ));
        }
        StreamChoice::BackgroundSnapshot => (Engine::BackgroundSnapshot, "as wanted".to_owned()),
        StreamChoice::Stopped => (Engine::Stopped, "as wanted".to_owned()),
    })
}

/// That pages which the guest writes during a live migration reach its stream, or why not.
///
/// # Errors
/// Why not, in words.
pub fn can_pre_copy_live(qemu: &QemuVersion, accelerator: Accelerator) -> Result<(), String> {
    if accelerator == Accelerator::Tcg && qemu.has(quirks::LIVE_TCG_MIGRATION_LOSES_PAGES) {
        return Err(format!(
            "QEMU {qemu} under TCG loses pages when it reads memory of a running guest"
        ));
    }
    Ok(())
}

#[cfg(test)]
mod test {
    use super::*;
    use crate::error::Class;

    fn live(major: u32, accelerator: Accelerator) -> Result<(), String> {
        let qemu = QemuVersion { major, minor: 0, micro: 0, package: String::new() };
        can_pre_copy_live(&qemu, accelerator)
    }

    fn able() -> Support {
        Support { background_snapshot: Ok(()), pre_copy: Ok(()), stopped: false }
    }

    fn stream(wanted: StreamChoice, live: &Result<(), String>) -> Result<Engine, VmError> {
        choose_stream(wanted, &able(), live.clone(), false, &Ok(())).map(|chosen| chosen.engine)
    }

    fn assert_refused<T: std::fmt::Debug>(result: Result<T, VmError>, reason: &str) {
        let error = result.unwrap_err();
        assert!(error.to_string().contains(reason), "{error}");
        assert_eq!(error.class(), Class::Refused);
    }

    #[test]
    fn the_tracker_comes_first_where_there_is_one() {
        let there = choose_tracker(EngineChoice::Auto, &Ok(())).unwrap();
        assert_eq!(there.unwrap().engine, Engine::Tracker);
        assert_eq!(choose_tracker(EngineChoice::Auto, &Err("none".to_owned())).unwrap(), None);
        assert_eq!(choose_tracker(EngineChoice::Stream, &Ok(())).unwrap(), None);
        assert_refused(
            choose_tracker(EngineChoice::Tracker, &Err("no plugin".to_owned())),
            "no plugin",
        );
    }

    #[test]
    fn only_the_old_emulator_is_mistrusted() {
        let can = |major, accelerator| live(major, accelerator).is_ok();
        assert!(!can(8, Accelerator::Tcg) && can(9, Accelerator::Tcg));
        assert!(can(7, Accelerator::Kvm));
    }

    #[test]
    fn a_guest_whose_live_stream_would_lose_pages_is_stopped() {
        let (old, kvm, new) =
            (live(8, Accelerator::Tcg), live(7, Accelerator::Kvm), live(9, Accelerator::Tcg));
        assert_eq!(stream(StreamChoice::Auto, &old).unwrap(), Engine::Stopped);
        assert_eq!(stream(StreamChoice::Auto, &kvm).unwrap(), Engine::PreCopy);
        assert_eq!(stream(StreamChoice::Auto, &new).unwrap(), Engine::PreCopy);
        assert_refused(stream(StreamChoice::PreCopy, &old), "--stream stopped");
        assert_eq!(stream(StreamChoice::Stopped, &new).unwrap(), Engine::Stopped);
    }

    #[test]
    fn a_guest_that_does_not_run_is_never_migrated() {
        let stopped = Support { stopped: true, ..able() };
        let (can, cannot) = (Ok(()), Err("not permitted".to_owned()));
        for wanted in [
            StreamChoice::Auto,
            StreamChoice::PreCopy,
            StreamChoice::BackgroundSnapshot,
            StreamChoice::Stopped,
        ] {
            let chosen = choose_stream(wanted, &stopped, Ok(()), false, &can).unwrap();
            assert_eq!(chosen.engine, Engine::ProcessMemory, "{wanted:?}");
        }
        assert_eq!(
            choose_stream(StreamChoice::Auto, &stopped, Ok(()), false, &cannot).unwrap().engine,
            Engine::BackgroundSnapshot
        );
        assert_refused(
            choose_stream(StreamChoice::Auto, &stopped, Ok(()), true, &cannot),
            "not permitted",
        );
        let old = Support { background_snapshot: Err("old".to_owned()), ..stopped };
        assert_refused(
            choose_stream(StreamChoice::Auto, &old, Ok(()), false, &cannot),
            "not permitted",
        );
    }

    #[test]
    fn what_cannot_be_had_is_refused_with_its_reason() {
        let none = Support {
            background_snapshot: Err("old kernel".to_owned()),
            pre_copy: Err("a blocker".to_owned()),
            stopped: false,
        };
        assert_refused(
            choose_stream(StreamChoice::Auto, &none, Ok(()), false, &Ok(())),
            "a blocker",
        );
        assert_refused(
            choose_stream(StreamChoice::BackgroundSnapshot, &none, Ok(()), false, &Ok(())),
            "old kernel",
        );
        assert_refused(
            choose_stream(StreamChoice::BackgroundSnapshot, &able(), Ok(()), true, &Ok(())),
            "our plugin",
        );
    }
}
