//! `stillpoint restore`: lets the VM's helper restore it, and prints what came of it. Several
//! copies are restored at once, each by a process of its own.

use crate::cli::RestoreArgs;
use crate::terminal::{Terminal, out, print_json};
use anyhow::{Context, Result};
use checkpoint_format::VmName;
use engine::progress::{Silent, bytes};
use engine::restore::{Hooks, Report, Request};
use futures::StreamExt;
use helper::client;
use helper::start::Supervision;
use serde_json::{Value, json};
use std::path::Path;
use vm::error::{Class, EngineError, InPhase, Phase, classed, usage};
use vm::runtime_dir::RuntimeDir;

/// Copies that are being restored at the same time.
const AT_ONCE: usize = 8;

pub(crate) async fn run(args: RestoreArgs, is_verbose: bool) -> Result<()> {
    let names = names(&args)?;
    if args.copies.is_some() || names.len() > 1 {
        return run_copies(&args, &names, is_verbose).await;
    }
    let request = request(&args, names.into_iter().next());
    let restored = helper::restore::start(&request, supervision(&args), is_verbose).await?;
    if args.wait {
        wait(&request, &restored, &Terminal).await?;
    }
    if args.json {
        return print_json(&serde_json::to_value(&restored).context("encoding the result")?);
    }
    print(&restored, args.wait);
    Ok(())
}

fn supervision(args: &RestoreArgs) -> Supervision {
    Supervision::unless(args.supervision.no_supervisor)
}

async fn wait(
    request: &Request,
    restored: &Report,
    progress: &dyn engine::progress::Progress,
) -> Result<(), EngineError> {
    let runtime = RuntimeDir::new(request.runtime_base.as_deref(), &restored.name);
    client::wait_until_hydrated(&runtime.in_phase(Phase::Open)?, progress).await
}

/// Of the copies, in order; none for the VM itself.
fn names(args: &RestoreArgs) -> Result<Vec<VmName>> {
    let Some(count) = args.copies else { return unique(args) };
    let base = match &args.new_names[..] {
        [] => &args.checkpoint.vm,
        [one] => one,
        _ => return Err(usage("--copies counts the copies of one name; give --as once")),
    };
    let name = |number| {
        let name = format!("{base}-{number}");
        name.parse().map_err(|error| usage(format!("{name} is no name of a VM: {error}")))
    };
    (1..=count).map(name).collect()
}

fn unique(args: &RestoreArgs) -> Result<Vec<VmName>> {
    let names = args.new_names.clone();
    let again = names.iter().enumerate().find(|(at, name)| names[..*at].contains(name));
    match again {
        Some((_, name)) => Err(usage(format!("two copies cannot have the name {name}"))),
        None if names.len() > 1 && args.take_over => {
            Err(usage("--take-over is for one VM; a copy takes over nothing"))
        }
        None => Ok(names),
    }
}

/// One that fails leaves the others running.
async fn run_copies(args: &RestoreArgs, names: &[VmName], is_verbose: bool) -> Result<()> {
    let requests: Vec<Request> =
        (1..).zip(names).map(|(number, name)| of_copy(args, name, number)).collect();
    let restores = requests.iter().map(|request| async move {
        let say = |line: &str| eprintln!("{}: {line}", request.name());
        let supervision = supervision(args);
        let restored = helper::restore::start_beside(request, supervision, is_verbose, say).await?;
        if args.wait {
            wait(request, &restored, &Silent).await?;
        }
        if !args.json {
            print(&restored, args.wait);
        }
        Ok(restored)
    });
    let done: Vec<Result<Report, EngineError>> =
        futures::stream::iter(restores).buffered(AT_ONCE).collect().await;
    if args.json {
        print_json(&json_of(names, &done)?)?;
    }
    failure(names, &done).map_or(Ok(()), Err)
}

fn of_copy(args: &RestoreArgs, name: &VmName, number: usize) -> Request {
    let parent = args.dir.as_deref().unwrap_or_else(|| Path::new(""));
    Request {
        dir: Some(parent.join(name.as_str())),
        map: args.map.iter().map(|map| map.of_copy(name.as_str(), number)).collect(),
        ..request(args, Some(name.clone()))
    }
}

fn json_of(names: &[VmName], done: &[Result<Report, EngineError>]) -> Result<Value> {
    let (mut restored, mut failed) = (Vec::new(), Vec::new());
    for (name, done) in names.iter().zip(done) {
        match done {
            Ok(report) => {
                restored.push(serde_json::to_value(report).context("encoding the result")?);
            }
            Err(error) => failed.push(json!({
                "name": name, "message": error.explain(), "class": error.class(),
                "exit_code": error.class().exit_code(), "phase": error.phase(),
            })),
        }
    }
    Ok(json!({ "restored": restored, "failed": failed }))
}

/// One error for all that failed, of their class if they have the same.
fn failure(names: &[VmName], done: &[Result<Report, EngineError>]) -> Option<anyhow::Error> {
    let failed =
        names.iter().zip(done).filter_map(|(name, done)| Some((name, done.as_ref().err()?)));
    let failed: Vec<(&VmName, &EngineError)> = failed.collect();
    let (_, first) = failed.first()?;
    let is_same = failed.iter().all(|(_, error)| error.class() == first.class());
    let class = if is_same { first.class() } else { Class::Failed };
    let each: Vec<String> =
        failed.iter().map(|(name, error)| format!("{name}: {}", error.explain())).collect();
    let counts = format!("{} of {} copies are not restored", failed.len(), names.len());
    Some(classed(class, format!("{counts}\n  {}", each.join("\n  "))))
}

fn print(restored: &Report, has_waited: bool) {
    out!(
        "{} {} as of {}@{}, {:.0} ms after the command, {} read from the store",
        restored.name,
        restored.state,
        restored.restored,
        restored.id,
        restored.resume_ms,
        bytes(restored.bytes_read),
    );
    if restored.memory_bytes_to_come > 0 && !has_waited {
        out!(
            "  {} of memory arrive while it runs; 'stillpoint status {}' shows how far they are",
            bytes(restored.memory_bytes_to_come),
            restored.name,
        );
    }
    if !restored.disks_to_come.is_empty() && !has_waited {
        out!("  disks that arrive while it runs: {}", restored.disks_to_come.join(", "));
    }
    restored.notes.iter().for_each(|note| out!("  note: {note}"));
}

fn request(args: &RestoreArgs, new_name: Option<VmName>) -> Request {
    Request {
        checkpoint: args.checkpoint.clone(),
        store: args.store.store.clone(),
        runtime_base: args.runtime.runtime_dir.clone(),
        new_name,
        dir: args.dir.clone(),
        qemu: args.qemu.clone(),
        fleecing: args.fleecing_dir.clone(),
        map: args.map.clone(),
        allow: args.allow.clone(),
        take_over: args.take_over,
        paused: args.paused,
        run: args.run,
        lazy: !args.eager,
        deadline: args.deadline,
        hooks: Hooks {
            before: args.hook_before.clone(),
            after: args.hook_after.clone(),
            timeout: args.hook_timeout,
        },
        keep_clock: args.keep_clock,
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use crate::cli::{Cli, Command};
    use checkpoint_format::CheckpointId;
    use clap::Parser;
    use vm::error::{class_of, refused};

    fn args(words: &str) -> RestoreArgs {
        let words = format!("stillpoint restore --store file:///s {words}");
        match Cli::try_parse_from(words.split(' ')).unwrap().command {
            Command::Restore(args) => args,
            _ => panic!("{words}"),
        }
    }

    fn named(words: &str) -> Vec<String> {
        names(&args(words)).unwrap().iter().map(ToString::to_string).collect()
    }

    #[test]
    fn copies_have_the_names_that_are_given_or_counted() {
        assert_eq!(named("web1"), [""; 0]);
        assert_eq!(named("web1 --as a"), ["a"]);
        assert_eq!(named("web1@7 --as b --as a"), ["b", "a"]);
        assert_eq!(named("web1 --copies 2"), ["web1-1", "web1-2"]);
        assert_eq!(named("web1 --as t --copies 1"), ["t-1"]);
    }

    #[test]
    fn copies_that_cannot_be_meant_are_an_error_of_usage() {
        let long = "x".repeat(64);
        for words in [
            "web1 --as a --as a",
            "web1 --as a --as b --copies 2",
            "web1 --as a --as b --take-over",
            &format!("{long} --copies 2"),
        ] {
            assert_eq!(class_of(&names(&args(words)).unwrap_err()), Class::Usage, "{words}");
        }
        for words in ["web1 --copies 0", "web1 --copies 65", "web1 --copies 2 --take-over"] {
            let words = format!("stillpoint restore --store file:///s {words}");
            assert!(Cli::try_parse_from(words.split(' ')).is_err(), "{words}");
        }
    }

    #[test]
    fn copies_have_directories_and_values_of_their_own() {
        let args = args(
            "web1 --as a --as b --dir /srv --map tcp::22-:22=tcp::22{number}-:22 --map x=/{name}.q",
        );
        let of = |number: usize, name: &str| of_copy(&args, &name.parse().unwrap(), number);
        let second = of(2, "b");
        assert_eq!(second.name().as_str(), "b");
        assert_eq!(second.dir.as_deref(), Some(Path::new("/srv/b")));
        let maps: Vec<String> = second.map.iter().map(ToString::to_string).collect();
        assert_eq!(maps, ["tcp::22-:22=tcp::222-:22", "x=/b.q"]);
    }

    fn report(name: &str) -> Report {
        serde_json::from_value(json!({
            "name": name, "restored": "web1", "id": CheckpointId(7), "running": true,
            "run_state": "running", "resume_ms": 1.0, "bytes_read": 1, "layer_bytes_read": 0,
            "dir": "/srv", "phases": {}, "notes": [],
        }))
        .unwrap()
    }

    #[test]
    fn copies_that_fail_are_named_and_the_others_are_reported() {
        let names: Vec<VmName> = ["a", "b", "c"].map(|name| name.parse().unwrap()).to_vec();
        let error = |why: &str| EngineError::new(Phase::Plan, refused(why));
        assert!(failure(&names[..1], &[Ok(report("a"))]).is_none());
        let done = [Err(error("its port is taken")), Ok(report("b")), Err(error("it exists"))];
        let said = failure(&names, &done).unwrap();
        assert_eq!(class_of(&said), Class::Refused);
        let lines = "2 of 3 copies are not restored\n  a: its port is taken\n  c: it exists";
        assert_eq!(said.to_string(), lines);
        let json = json_of(&names, &done).unwrap();
        assert_eq!(json["restored"].as_array().unwrap().len(), 1);
        assert_eq!(json["restored"][0]["name"], "b");
        let failed = json!({
            "name": "c", "message": "it exists", "class": "refused", "exit_code": 3,
            "phase": "plan",
        });
        assert_eq!(json["failed"][1], failed);
        let other = EngineError::new(Phase::Start, anyhow::anyhow!("QEMU crashed"));
        let mixed = failure(&names, &[Err(error("x")), Err(other), Ok(report("c"))]);
        assert_eq!(class_of(&mixed.unwrap()), Class::Failed);
    }
}
