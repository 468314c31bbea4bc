//! The other end of the control socket.

use crate::control::{BarePause, MAX_LINE, Reply, Request, Status};
use anyhow::{Context, Result, anyhow};
use backon::{ConstantBuilder, Retryable};
use engine::checkpoint::Choice;
use engine::progress::{Progress, Update};
use engine::restore::lazy_disks::DisksStatus;
use serde::de::DeserializeOwned;
use serde_json::Value;
use std::os::unix::fs::MetadataExt;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, Take};
use tokio::net::UnixStream;
use vm::error::{EngineError, InPhase, Phase, refused};
use vm::process;
use vm::runtime_dir::RuntimeDir;

/// How long after a VM's launch its helper may be on its way up.
const STARTUP: Duration = Duration::from_secs(10);
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// A helper that was launched a moment ago is waited for, unless it has failed.
async fn connect(runtime: &RuntimeDir) -> std::io::Result<UnixStream> {
    let polls = ConstantBuilder::new().with_delay(POLL_INTERVAL).without_max_times();
    (|| UnixStream::connect(runtime.control()))
        .retry(polls)
        .when(|_| runtime.launched_within(STARTUP) && runtime.helper_failure().is_none())
        .await
}

/// Why a helper gives no answer: it ends with its QEMU.
fn ended(runtime: &RuntimeDir) -> anyhow::Error {
    let pid = runtime.vm().ok().and_then(|file| file.pid);
    match pid {
        Some(pid) if process::started(pid).is_none() => {
            anyhow!("the VM's QEMU (process {pid}) has ended, and its helper with it")
        }
        _ => anyhow!(
            "the helper ended before it answered; if the VM still runs, 'stillpoint attach' starts another helper"
        ),
    }
}

/// Asks for a checkpoint and waits until it is durable: an `Outcome` in the helper's own form.
///
/// # Errors
/// The helper's, with its class; or when no helper answers.
pub async fn checkpoint(
    runtime: &RuntimeDir,
    choice: Choice,
    show: impl Fn(&Update),
) -> Result<Value, EngineError> {
    ask(runtime, &Request::Checkpoint(choice), show).await
}

/// Asks how the helper is.
///
/// # Errors
/// When no helper answers.
pub async fn status(runtime: &RuntimeDir) -> Result<Status, EngineError> {
    decode(ask(runtime, &Request::Status, |_| ()).await?)
}

/// Until nothing of the VM's memory and disks is to come from the store.
///
/// # Errors
/// When the helper ends before that.
pub async fn wait_until_hydrated(
    runtime: &RuntimeDir,
    progress: &dyn Progress,
) -> Result<(), EngineError> {
    let mut bars = [("memory", None), ("disks", None)];
    loop {
        let now = status(runtime).await?;
        let memory = now.hydration.as_ref().map(|memory| (memory.done_bytes, memory.total_bytes));
        let disks = now.disks.as_ref().map(DisksStatus::sum);
        if (memory, disks) == (None, None) {
            return Ok(());
        }
        for ((what, bar), state) in bars.iter_mut().zip([memory, disks]) {
            let Some((done, total)) = state else { continue };
            let (bar, shown) = bar.get_or_insert_with(|| (progress.begin(what, total), 0));
            bar.advance(done.saturating_sub(*shown));
            *shown = done.max(*shown);
        }
        tokio::time::sleep(POLL_INTERVAL).await;
    }
}

/// Asks for a bare `stop` and `cont`.
///
/// # Errors
/// The helper's, with its class; or when no helper answers.
pub async fn bare_pause(runtime: &RuntimeDir) -> Result<BarePause, EngineError> {
    decode(ask(runtime, &Request::BarePause, |_| ()).await?)
}

/// A helper of another version may answer in another form.
///
/// # Errors
/// When the answer lacks what is expected of it.
pub fn decode<T: DeserializeOwned>(answer: Value) -> Result<T, EngineError> {
    serde_json::from_value(answer)
        .context("the helper's answer cannot be parsed")
        .in_phase(Phase::Ask)
}

/// Sends one request and waits for its result, showing progress meanwhile.
///
/// # Errors
/// The helper's, with its class and phase; or when no helper answers.
pub async fn ask(
    runtime: &RuntimeDir,
    request: &Request,
    show: impl Fn(&Update),
) -> Result<Value, EngineError> {
    let mut replies = send(runtime, request).await.in_phase(Phase::Ask)?;
    loop {
        match next(&mut replies, runtime).await.in_phase(Phase::Ask)? {
            Reply::Progress(update) => show(&update),
            Reply::Done(value) => return Ok(value),
            Reply::Failed(failure) => return Err(failure.into()),
        }
    }
}

type Replies = BufReader<Take<UnixStream>>;

async fn send(runtime: &RuntimeDir, request: &Request) -> Result<Replies> {
    let path = runtime.control();
    let stream = connect(runtime).await;
    let mut stream = stream.map_err(|error| {
        refused(format!("no helper answers at {} ({error}); 'stillpoint attach NAME' starts one for a running VM", path.display()))
    })?;
    let peer = stream.peer_cred().context("asking who answers for the helper")?.uid();
    let owner = std::fs::symlink_metadata(runtime.path()).map(|facts| facts.uid()).ok();
    if !may_answer(peer, owner) {
        return Err(refused(format!(
            "{} is answered by user {peer}, whose directory that is not",
            path.display()
        )));
    }
    let mut line = serde_json::to_vec(request).context("encoding the request")?;
    line.push(b'\n');
    stream.write_all(&line).await.context("sending the request to the helper")?;
    Ok(BufReader::new(stream.take(0)))
}

/// Who answers must be who owns the directory: root may ask where another user could have put any
/// socket.
fn may_answer(peer: u32, owner: Option<u32>) -> bool {
    peer == 0 || Some(peer) == owner
}

async fn next(replies: &mut Replies, runtime: &RuntimeDir) -> Result<Reply> {
    let mut line = String::new();
    replies.get_mut().set_limit(MAX_LINE as u64);
    let count = match replies.read_line(&mut line).await {
        // It ended with the request unread.
        Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => 0,
        count => count.context("reading the helper's answer")?,
    };
    if count == 0 {
        return Err(ended(runtime));
    }
    Ok(Reply::parse(&line)?)
}

#[cfg(test)]
mod test {
    use super::*;
    use crate::scene::Place;
    use engine::progress::Advance;
    use std::sync::{Arc, Mutex};
    use tokio::net::UnixListener;
    use vm::error::Class;
    use vm::runtime_dir::Failure;

    async fn checkpoint_of(place: &Place) -> Result<Value, EngineError> {
        checkpoint(&place.runtime, Choice::default(), |_| ()).await
    }

    #[tokio::test]
    async fn client_is_refused_where_no_helper_listens() {
        let place = Place::new();
        let refusal = status(&place.runtime).await.unwrap_err();
        assert_eq!((refusal.class(), refusal.phase()), (Class::Refused, Phase::Ask));
        assert!(refusal.to_string().contains("stillpoint attach"), "{refusal}");
    }

    /// The VM was launched a moment ago.
    #[tokio::test]
    async fn client_waits_for_a_helper_on_its_way_up() {
        let place = Place::new();
        place.runtime.save_vm(&place.file(1)).unwrap();
        let runtime = place.runtime.clone();
        let asking = tokio::spawn(async move { status(&runtime).await });
        tokio::task::yield_now().await;
        let helper = place.helper(&[r#"{"done":{"pid":7,"busy":true}}"#]);
        assert_eq!(asking.await.unwrap().unwrap().pid, 7);
        assert_eq!(helper.join().unwrap(), "\"status\"\n");
    }

    #[tokio::test(start_paused = true)]
    async fn client_does_not_wait_for_a_helper_that_has_failed() {
        let begun = tokio::time::Instant::now();
        let place = Place::new();
        place.runtime.save_vm(&place.file(1)).unwrap();
        let error = EngineError::new(Phase::Attach, refused("another QEMU"));
        place.runtime.set_helper_failure(&Failure::of(&error));
        assert_eq!(status(&place.runtime).await.unwrap_err().class(), Class::Refused);
        assert!(begun.elapsed() < POLL_INTERVAL, "it waited for {:?}", begun.elapsed());
    }

    #[tokio::test]
    async fn client_shows_progress_in_order_and_then_has_the_result() {
        let place = Place::new();
        let helper = place.helper(&[
            r#"{"progress":{"phase":"pre-copy","done":1,"total":6}}"#,
            r#"{"progress":{"phase":"disk d","done":5,"total":9}}"#,
            r#"{"done":{"id":4}}"#,
        ]);
        let seen = Mutex::new(Vec::new());
        let note = |update: &Update| {
            seen.lock().unwrap().push((update.phase.clone(), update.done, update.total));
        };
        let done = checkpoint(&place.runtime, Choice::default(), note).await.unwrap();
        assert_eq!(done["id"], 4);
        let seen = seen.into_inner().unwrap();
        assert_eq!(seen, [("pre-copy".to_owned(), 1, 6), ("disk d".to_owned(), 5, 9)]);
        assert!(helper.join().unwrap().starts_with("{\"checkpoint\":"));
    }

    #[tokio::test]
    async fn client_has_the_failure_of_its_helper_with_class_and_phase() {
        let earlier = r#"{"failed":{"message":"full","exit_code":4}}"#;
        let later =
            r#"{"failed":{"message":"full","exit_code":1,"class":"store","phase":"upload"}}"#;
        for (answer, phase) in [(earlier, Phase::Unknown), (later, Phase::Upload)] {
            let place = Place::new();
            let helper = place.helper(&[answer]);
            let failure = checkpoint_of(&place).await.unwrap_err();
            assert_eq!((failure.class(), failure.phase()), (Class::Store, phase), "{answer}");
            assert_eq!(failure.explain(), "full");
            helper.join().unwrap();
        }
    }

    #[tokio::test]
    async fn client_says_why_a_helper_hangs_up() {
        let place = Place::new();
        let mut child = std::process::Command::new("true").spawn().unwrap();
        child.wait().unwrap();
        for (process, words) in [(std::process::id(), "attach"), (child.id(), "QEMU (process")] {
            place.runtime.save_vm(&place.file(process)).unwrap();
            let helper = place.helper(&[]);
            let error = status(&place.runtime).await.unwrap_err();
            assert_eq!((error.class(), error.phase()), (Class::Failed, Phase::Ask));
            assert!(error.to_string().contains(words), "{error}");
            helper.join().unwrap();
            std::fs::remove_file(place.runtime.control()).unwrap();
        }
    }

    #[tokio::test]
    async fn client_takes_no_answer_that_is_none_or_has_no_end() {
        let endless = "[".repeat(2 * MAX_LINE);
        for answer in ["no JSON", r#"{"done":1,"failed":2}"#, r#"{"later":{}}"#, &endless] {
            let place = Place::new();
            let helper = place.helper(&[answer]);
            let error = checkpoint_of(&place).await.unwrap_err();
            assert!(error.to_string().contains("cannot be parsed"), "{error}");
            helper.join().unwrap();
        }
    }

    #[tokio::test]
    async fn client_of_another_version_says_so() {
        let place = Place::new();
        let helper = place.helper(&[r#"{"done":{"pause":1.5}}"#]);
        let error = bare_pause(&place.runtime).await.unwrap_err();
        assert!(error.to_string().contains("cannot be parsed"), "{error}");
        assert_eq!(helper.join().unwrap(), "\"bare_pause\"\n");
    }

    #[test]
    fn control_socket_is_answered_by_root_or_the_directory_owner() {
        assert!(may_answer(0, Some(1000)) && may_answer(0, None));
        assert!(may_answer(1000, Some(1000)));
        assert!(!may_answer(1000, Some(0)) && !may_answer(1000, Some(1001)));
        assert!(!may_answer(1000, None), "a directory that is gone");
    }

    struct Bar(Arc<Mutex<Vec<u64>>>);

    impl Progress for Bar {
        fn begin(&self, what: &str, total: u64) -> Box<dyn Advance> {
            assert_eq!((what, total), ("memory", 90));
            Box::new(Self(Arc::clone(&self.0)))
        }

        fn note(&self, text: &str) {
            panic!("{text}");
        }
    }

    impl Advance for Bar {
        fn advance(&self, bytes: u64) {
            self.0.lock().unwrap().push(bytes);
        }
    }

    fn arrived(bytes: u64) -> String {
        let hydration = format!(r#"{{"vm":"a","checkpoint":3,"store":"s","done_bytes":{bytes},"#)
            + r#""total_bytes":90,"faults":0}"#;
        format!(r#"{{"done":{{"pid":1,"busy":true,"hydration":{hydration}}}}}"#)
    }

    /// What has arrived is shown once, though a new helper may count less.
    #[tokio::test]
    async fn hydration_is_waited_for_until_it_is_done() {
        let place = Place::new();
        let listener = UnixListener::bind(place.runtime.control()).unwrap();
        let helper = tokio::spawn(async move {
            let done = r#"{"done":{"pid":1,"busy":true}}"#.to_owned();
            for answer in [arrived(10), arrived(10), arrived(50), arrived(40), arrived(90), done] {
                let (mut stream, _) = listener.accept().await.unwrap();
                stream.write_all(format!("{answer}\n").as_bytes()).await.unwrap();
                // The request is read: what closes with it unread resets the connection.
                let _ = stream.read(&mut [0; 64]).await;
            }
        });
        let shown = Arc::new(Mutex::new(Vec::new()));
        wait_until_hydrated(&place.runtime, &Bar(Arc::clone(&shown))).await.unwrap();
        helper.await.unwrap();
        assert_eq!(*shown.lock().unwrap(), [10, 0, 40, 0, 40]);
    }

    #[tokio::test]
    async fn hydration_without_a_helper_is_not_waited_for() {
        let place = Place::new();
        let helper = place.helper(&[&arrived(10)]);
        let error = wait_until_hydrated(&place.runtime, &engine::progress::Silent).await;
        assert_eq!(error.unwrap_err().class(), Class::Refused);
        helper.join().unwrap();
    }
}
