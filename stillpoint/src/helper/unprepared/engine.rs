//! Which engine a machine is attached with: what its owner wants, if it can be had.

use crate::engine::{Engine, EngineChoice, StreamChoice};
use crate::exit::refused;
use anyhow::Result;
use qmp_bridge::migration::{StreamMode, Support};

pub struct Choice {
    pub engine: Engine,
    pub why: String,
}

/// A checkpoint chooses anew; what cannot be had at all is refused before a helper is started.
pub fn choose(engine: EngineChoice, stream: StreamChoice, tracker: &Result<(), String>, support: &Support) -> Result<Choice> {
    match (engine, tracker) {
        (EngineChoice::Tracker, Err(why)) => {
            Err(refused(format!("the tracker cannot follow this machine: {why}; use --engine stream, or 'stillpoint adopt' afterwards")))
        }
        (EngineChoice::Tracker, Ok(())) => Ok(Choice { engine: Engine::Tracker, why: "as wanted".to_owned() }),
        (EngineChoice::Auto, Ok(())) => Ok(Choice { engine: Engine::Tracker, why: "the plugin sits in this QEMU".to_owned() }),
        (EngineChoice::Auto, Err(why)) => choose_stream(stream, support, why),
        (EngineChoice::Stream, _) => choose_stream(stream, support, "as wanted"),
    }
}

fn choose_stream(stream: StreamChoice, support: &Support, why: &str) -> Result<Choice> {
    use StreamMode::{BackgroundSnapshot, PreCopy};
    let choice = |mode, why: String| Ok(Choice { engine: Engine::Stream(mode), why });
    match (stream, &support.pre_copy, &support.background_snapshot) {
        (StreamChoice::Auto | StreamChoice::PreCopy, Ok(()), _) => choice(PreCopy, why.to_owned()),
        (StreamChoice::BackgroundSnapshot, _, Ok(())) => choice(BackgroundSnapshot, why.to_owned()),
        (StreamChoice::Auto, Err(no), Ok(())) => choice(BackgroundSnapshot, format!("{why}; no pre-copy: {no}")),
        (StreamChoice::PreCopy, Err(no), _) => Err(refused(format!("this QEMU's memory cannot be read by pre-copy: {no}"))),
        (StreamChoice::BackgroundSnapshot, _, Err(no)) => Err(refused(format!("this QEMU's memory cannot be read by background-snapshot: {no}"))),
        (StreamChoice::Auto, Err(no), Err(neither)) => {
            Err(refused(format!("this QEMU's memory cannot be read: by pre-copy: {no}; by background-snapshot: {neither}")))
        }
    }
}

#[cfg(test)]
mod test {
    use super::*;

    fn no(why: &str) -> Result<(), String> {
        Err(why.to_owned())
    }

    fn engine(engine: EngineChoice, stream: StreamChoice, tracker: &Result<(), String>, support: &Support) -> Result<&'static str> {
        choose(engine, stream, tracker, support).map(|choice| choice.engine.name())
    }

    #[test]
    fn the_tracker_comes_first_and_pre_copy_next() {
        let all = Support { background_snapshot: Ok(()), pre_copy: Ok(()) };
        let auto = |tracker, support| engine(EngineChoice::Auto, StreamChoice::Auto, tracker, support).unwrap();
        assert_eq!(auto(&Ok(()), &all), "tracker");
        assert_eq!(auto(&no("none"), &all), "pre-copy");
        assert_eq!(auto(&no("none"), &Support { background_snapshot: Ok(()), pre_copy: no("x") }), "background-snapshot");
    }

    #[test]
    fn what_cannot_be_had_is_refused_with_its_reason() {
        let none = Support { background_snapshot: no("old kernel"), pre_copy: no("a blocker") };
        for (wanted, stream, reason) in [
            (EngineChoice::Tracker, StreamChoice::Auto, "no plugin"),
            (EngineChoice::Auto, StreamChoice::Auto, "a blocker"),
            (EngineChoice::Stream, StreamChoice::PreCopy, "a blocker"),
            (EngineChoice::Stream, StreamChoice::BackgroundSnapshot, "old kernel"),
        ] {
            let error = engine(wanted, stream, &no("no plugin"), &none).unwrap_err();
            assert!(error.to_string().contains(reason), "{error}");
            assert_eq!(crate::exit::code_of(&error), crate::exit::REFUSED);
        }
    }
}
