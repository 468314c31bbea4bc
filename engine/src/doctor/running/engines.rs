//! Which engine can take the memory of a running VM, and for how long the guest would be stopped.

use super::super::Row;
use super::{EngineReport, cannot};
use anyhow::Error;
use qmp_bridge::migration::{StreamOptions, Support};
use std::collections::BTreeMap;
use vm::external::probe::Probe;
use vm::launch::external::ExternalVm;
use vm::memory_source::{Engine, StreamChoice, can_pre_copy_live, choose_stream};
use vm::process_memory::ProcessMemory;

/// `stop`, the disks' transaction, the devices' state and `cont`, in milliseconds; docs/attach.md
/// has the measurements.
const BASE_MS: u64 = 10;
/// Finding and protecting written pages.
const TRACKER_MS_PER_GIB: u64 = 1;
/// Reading memory to protect it, and reading all of it into the stream.
const READ_MS_PER_GIB: u64 = 1000;
const GIB: u64 = 1 << 30;

const HAVE_PLUGIN: &str = "not needed; to have it, start QEMU with -plugin file=libstillpoint_plugin.so,socket=PATH, or use 'stillpoint adopt'";
const OTHER_ENGINE: &str = "not needed where another engine is possible (docs/attach.md)";

/// Each engine by its name, and its row; or the row that says why QEMU could not be asked.
pub(super) async fn check(
    look: &Probe,
    found: Option<&ExternalVm>,
) -> Result<(BTreeMap<String, EngineReport>, Vec<Row>), Row> {
    let tracker = match found {
        Some(found) => look.tracker(found).await,
        None => Err("the command line cannot be restored, see its row".to_owned()),
    };
    let support = look.support().await.map_err(|error| {
        cannot("engine", &error.into(), "wait until that migration has ended, and try again")
    })?;
    let live = can_pre_copy_live(&look.facts.qemu, look.facts.accelerator);
    let has_plugin = found.is_some_and(|found| found.plugin.is_some());
    let process_memory = ProcessMemory::check(&look.qmp, look.process.pid, support.stopped).await;
    let all = judge(tracker, &support, &live, has_plugin, &process_memory);
    let report = |can: &Result<(), String>| EngineReport {
        possible: can.is_ok(),
        why_not: can.as_ref().err().cloned(),
    };
    let engines = all.iter().map(|(engine, can)| (engine.name().to_owned(), report(can))).collect();
    let is_possible = all.iter().any(|(_, can)| can.is_ok());
    let ram_bytes = look.blocks.iter().map(|block| block.used).sum();
    let rows = all.into_iter().map(|(engine, can)| row(engine, can, ram_bytes, is_possible));
    Ok((engines, rows.collect()))
}

type Judged = Vec<(Engine, Result<(), String>)>;

/// As a checkpoint chooses.
fn judge(
    tracker: Result<(), String>,
    support: &Support,
    live: &Result<(), String>,
    has_plugin: bool,
    process_memory: &Result<(), String>,
) -> Judged {
    let choose = |wanted| {
        choose_stream(wanted, support, live.clone(), has_plugin, process_memory)
            .map(|chosen| chosen.engine)
    };
    let mut judged = vec![(Engine::Tracker, tracker)];
    if support.stopped {
        let chosen = choose(StreamChoice::Auto);
        judged.push((
            *chosen.as_ref().unwrap_or(&Engine::ProcessMemory),
            chosen.map(drop).map_err(|error| error.to_string()),
        ));
    } else {
        let choices = [
            (Engine::PreCopy, StreamChoice::PreCopy),
            (Engine::BackgroundSnapshot, StreamChoice::BackgroundSnapshot),
            (Engine::Stopped, StreamChoice::Stopped),
        ];
        judged.extend(choices.map(|(engine, choice)| {
            (engine, choose(choice).map(drop).map_err(|error| error.to_string()))
        }));
    }
    judged
}

fn row(engine: Engine, can: Result<(), String>, ram_bytes: u64, is_another_possible: bool) -> Row {
    let check = format!("engine {}", engine.name());
    let remedy = if engine == Engine::Tracker { HAVE_PLUGIN } else { OTHER_ENGINE };
    match can {
        Ok(()) => Row::ok(check, format!("possible; {}", pause(engine, ram_bytes))),
        Err(why) if is_another_possible => Row::warn(check, why, remedy),
        Err(why) => cannot(check, &Error::msg(why), "see docs/attach.md"),
    }
}

/// An estimate: the guest is not stopped to find out.
fn pause(engine: Engine, ram_bytes: u64) -> String {
    let with = |ms_per_gib: u64| BASE_MS + ms_per_gib * ram_bytes / GIB;
    match engine {
        Engine::Tracker => format!("pauses of about {} ms", with(TRACKER_MS_PER_GIB)),
        Engine::PreCopy => {
            let rest = StreamOptions::default().max_pause.as_millis();
            format!(
                "pauses of about {BASE_MS} ms and what the guest writes at the end, {rest} ms more at most"
            )
        }
        Engine::BackgroundSnapshot => format!(
            "pauses of up to {} ms, and a slower guest while its memory is read",
            with(READ_MS_PER_GIB)
        ),
        Engine::ProcessMemory => "a guest that does not run has no pause".to_owned(),
        Engine::Stopped => {
            format!(
                "the guest is stopped while all of its memory is read, about {} ms (longer the first time)",
                with(READ_MS_PER_GIB)
            )
        }
    }
}

#[cfg(test)]
mod test {
    use super::super::super::State;
    use super::*;
    use qmp_bridge::qmp::QemuVersion;
    use qmp_bridge::vm::Accelerator;

    fn live(major: u32) -> Result<(), String> {
        let qemu = QemuVersion { major, minor: 0, micro: 0, package: String::new() };
        can_pre_copy_live(&qemu, Accelerator::Tcg)
    }

    #[test]
    fn pauses_grow_with_memory_where_memory_is_walked() {
        assert_eq!(pause(Engine::Tracker, 2 * GIB), "pauses of about 12 ms");
        assert!(pause(Engine::Stopped, 2 * GIB).contains("2010 ms"));
        assert!(pause(Engine::PreCopy, 64 * GIB).contains("100 ms more at most"));
    }

    #[test]
    fn engine_of_a_stopped_guest_is_that_of_its_checkpoint() {
        let stopped =
            Support { background_snapshot: Err("old".to_owned()), pre_copy: Ok(()), stopped: true };
        let judged = |memory| {
            judge(Err("no plugin".to_owned()), &stopped, &live(10), false, &memory).remove(1)
        };
        assert_eq!(judged(Ok(())), (Engine::ProcessMemory, Ok(())));
        let (engine, can) = judged(Err("not permitted".to_owned()));
        assert!(
            engine == Engine::ProcessMemory && can.is_err_and(|why| why.contains("not permitted"))
        );
    }

    #[test]
    fn an_engine_that_cannot_be_had_is_no_fault_while_there_is_another() {
        let able = Support { background_snapshot: Ok(()), pre_copy: Ok(()), stopped: false };
        let can = |tracker, major, has_plugin| -> Vec<bool> {
            judge(tracker, &able, &live(major), has_plugin, &Ok(()))
                .into_iter()
                .map(|(_, can)| can.is_ok())
                .collect()
        };
        let none = || Err("no plugin".to_owned());
        assert_eq!(can(none(), 10, false), [false, true, true, true]);
        assert_eq!(can(none(), 7, false), [false, false, true, true], "TCG of QEMU 7 loses pages");
        assert_eq!(can(Ok(()), 10, true), [true, true, false, true]);
        assert_eq!(row(Engine::Tracker, none(), GIB, true).state, State::Warn);
        assert_eq!(row(Engine::Tracker, none(), GIB, false).state, State::No);
    }
}
