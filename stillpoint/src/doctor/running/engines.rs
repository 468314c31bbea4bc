//! Which engine can take the memory of a running machine, and for how long the guest would stand still.

use super::super::Row;
use super::cannot;
use crate::engine::{Engine, can_pre_copy_live};
use crate::helper::unprepared::look::Look;
use crate::launch::foreign::Foreign;
use anyhow::Error;
use qmp_bridge::machine::MachineFacts;
use qmp_bridge::migration::{StreamOptions, Support};
use serde_json::{Value, json};

/// `stop`, the disks' transaction, the devices' state and `cont`, in milliseconds; docs/attach.md has the measurements.
const BASE_MS: u64 = 10;
/// Finding and protecting written pages.
const TRACKER_MS_PER_GIB: u64 = 1;
/// Reading memory to protect it, and reading all of it into the stream.
const READ_MS_PER_GIB: u64 = 1000;
const GIB: u64 = 1 << 30;

const HAVE_PLUGIN: &str =
    "not needed; to have it, start QEMU with -plugin file=libstillpoint_plugin.so,socket=PATH, or use 'stillpoint adopt'";
const OTHER_ENGINE: &str = "not needed where another engine is possible (docs/attach.md)";

pub async fn check(look: &Look, found: Option<&Foreign>, engines: &mut Value) -> Vec<Row> {
    let tracker = match found {
        Some(found) => look.tracker(found).await,
        None => Err("the machine is not understood".to_owned()),
    };
    let support = match look.support().await {
        Ok(support) => support,
        Err(error) => return vec![cannot("engine", &error, "wait until that migration has ended, and try again")],
    };
    let has_plugin = found.is_some_and(|found| found.plugin.is_some());
    let all = judge(tracker, &support, &look.facts, has_plugin);
    *engines = all
        .iter()
        .map(|(engine, can)| (engine.name().to_owned(), json!({ "possible": can.is_ok(), "why_not": can.as_ref().err() })))
        .collect();
    let is_possible = all.iter().any(|(_, can)| can.is_ok());
    let ram_bytes = look.blocks.iter().map(|block| block.used).sum();
    all.into_iter().map(|(engine, can)| row(engine, can, ram_bytes, is_possible)).collect()
}

type Judged = [(Engine, Result<(), String>); 4];

fn judge(tracker: Result<(), String>, support: &Support, facts: &MachineFacts, has_plugin: bool) -> Judged {
    let pre_copy = can_pre_copy_live(facts).and(support.pre_copy.clone());
    let background = match has_plugin {
        true => Err("QEMU would find its memory registered by the plugin, and abort".to_owned()),
        false => support.background_snapshot.clone(),
    };
    [
        (Engine::Tracker, tracker),
        (Engine::PreCopy, pre_copy),
        (Engine::BackgroundSnapshot, background),
        (Engine::Stopped, support.pre_copy.clone()),
    ]
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
            format!("pauses of about {BASE_MS} ms and what the guest writes at the end, {rest} ms more at most")
        }
        Engine::BackgroundSnapshot => format!("pauses of up to {} ms, and a slower guest while its memory is read", with(READ_MS_PER_GIB)),
        Engine::ProcessMemory => "a guest that does not run has no pause".to_owned(),
        Engine::Stopped => {
            format!("the guest stands still while all of its memory is read, about {} ms (longer the first time)", with(READ_MS_PER_GIB))
        }
    }
}

#[cfg(test)]
mod test {
    use super::super::super::State;
    use super::*;
    use crate::engine::test::facts as facts_of;
    use qmp_bridge::machine::Accelerator;

    fn facts(major: u32) -> MachineFacts {
        facts_of(major, Accelerator::Tcg)
    }

    #[test]
    fn pauses_grow_with_memory_where_memory_is_walked() {
        assert_eq!(pause(Engine::Tracker, 2 * GIB), "pauses of about 12 ms");
        assert!(pause(Engine::Stopped, 2 * GIB).contains("2010 ms"));
        assert!(pause(Engine::PreCopy, 64 * GIB).contains("100 ms more at most"));
    }

    #[test]
    fn an_engine_that_cannot_be_had_is_no_fault_while_there_is_another() {
        let able = Support { background_snapshot: Ok(()), pre_copy: Ok(()), stopped: false };
        let can = |judged: Judged| judged.map(|(_, can)| can.is_ok());
        let none = || Err("no plugin".to_owned());
        assert_eq!(can(judge(none(), &able, &facts(10), false)), [false, true, true, true]);
        assert_eq!(can(judge(none(), &able, &facts(7), false)), [false, false, true, true], "TCG of QEMU 7 loses pages");
        assert_eq!(can(judge(Ok(()), &able, &facts(10), true)), [true, true, false, true]);
        assert_eq!(row(Engine::Tracker, none(), GIB, true).state, State::Warn);
        assert_eq!(row(Engine::Tracker, none(), GIB, false).state, State::No);
    }
}
