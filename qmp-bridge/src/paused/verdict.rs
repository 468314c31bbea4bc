//! Whether another client changed the VM during a pause, and whether the helper still has to resume
//! the guest at its end.
//!
//! QEMU's main loop runs through a pause, so another monitor's `cont`, `system_reset` or `migrate`
//! takes effect in it. Which parts of the state are of one instant is then unknown, so the
//! checkpoint fails; and the owner's command stays in effect. QEMU reports a `cont` by an event, a
//! reset by an event and a run state, the rest by a run state. It reports nothing when `stop` is
//! sent while the guest is stopped already: the helper cannot detect an owner's `stop` within its
//! pause, and the guest runs after it.

use crate::qmp::QmpEvent;

/// Events that a pause has none of between our `stop` and our `cont`.
pub(super) const EVENTS: &[&str] =
    &["STOP", "RESUME", "RESET", "SHUTDOWN", "SUSPEND", "WAKEUP", "GUEST_PANICKED"];

/// What is to be done at the end of a pause.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Verdict {
    /// The guest must run again, and the helper must send the `cont`.
    pub(super) needs_cont: bool,
    /// What another client did.
    pub(super) disturbance: Option<String>,
}

/// `ran`: the guest ran before we stopped it. `expected`: the run state that our own work led to.
/// `state`: as it is now, if QEMU said so in time. `events`: those of [`EVENTS`] that came since
/// the guest was stopped.
pub(super) fn judge(
    ran: bool,
    expected: &str,
    state: Option<&str>,
    events: &[QmpEvent],
) -> Verdict {
    let has = |name: &str| events.iter().any(|event| event.name == name);
    let disturbance = match (events.first(), state) {
        (Some(event), _) => Some(describe(&event.name).to_owned()),
        (None, Some(state)) if state != expected => Some(format!("its run state became `{state}`")),
        _ => None,
    };
    // After a `cont` of another client, that client wants the guest's state as it is, running or
    // stopped again.
    let is_own_state = |state: &str| {
        // A migration of ours that failed may be on its way out.
        state == expected
            || matches!(state, "paused" | "prelaunch")
            || expected == "postmigrate" && state == "finish-migrate"
    };
    let is_ours = !has("RESUME") && state.is_none_or(is_own_state);
    Verdict { needs_cont: ran && is_ours, disturbance }
}

/// After our own `cont`: whether more came than its event.
pub(super) fn after_cont(events: &[QmpEvent]) -> Option<String> {
    let mut resumed = false;
    let strange =
        events.iter().find(|event| event.name != "RESUME" || std::mem::replace(&mut resumed, true));
    strange.map(|event| describe(&event.name).to_owned())
}

fn describe(event: &str) -> &'static str {
    match event {
        "RESUME" => "the guest was let run (`cont`)",
        "STOP" => "the guest was let run and stopped again",
        "RESET" => "the VM was reset",
        "SHUTDOWN" => "the VM was asked to shut down",
        _ => "the guest's power state changed",
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use serde_json::Value;
    use std::time::Instant;

    fn events(names: &[&str]) -> Vec<QmpEvent> {
        names
            .iter()
            .map(|name| QmpEvent { name: (*name).into(), data: Value::Null, at: Instant::now() })
            .collect()
    }

    #[test]
    fn pause_verdict_reports_changes_by_another_client_and_keeps_them() {
        // ran, state, events -> cont is ours, disturbed
        type Row<'a> = (bool, Option<&'a str>, &'a [&'a str], bool, bool);
        let table: &[Row<'_>] = &[
            (true, Some("paused"), &[], true, false),
            (true, Some("running"), &["RESUME"], false, true),
            (true, Some("paused"), &["RESUME", "STOP"], false, true),
            (true, Some("prelaunch"), &["RESET"], true, true),
            (true, Some("prelaunch"), &[], true, true),
            (true, Some("postmigrate"), &[], false, true),
            (true, Some("shutdown"), &["RESET", "SHUTDOWN"], false, true),
            (true, None, &[], true, false),
            (true, None, &["RESUME"], false, true),
            (false, Some("paused"), &[], false, false),
            (false, Some("running"), &["RESUME"], false, true),
            (false, Some("prelaunch"), &["RESET"], false, true),
        ];
        for (ran, state, names, cont, disturbed) in table {
            let verdict = judge(*ran, "paused", *state, &events(names));
            assert_eq!(
                (verdict.needs_cont, verdict.disturbance.is_some()),
                (*cont, *disturbed),
                "{ran} {state:?} {names:?}: {verdict:?}"
            );
        }
        assert!(judge(true, "postmigrate", Some("postmigrate"), &[]).needs_cont);
    }

    #[test]
    fn pause_ends_with_one_resume() {
        assert_eq!(after_cont(&events(&["RESUME"])), None);
        for names in [&["RESUME", "STOP"][..], &["RESET", "RESUME"], &["RESUME", "RESUME"]] {
            assert!(after_cont(&events(names)).is_some(), "{names:?}");
        }
    }
}
