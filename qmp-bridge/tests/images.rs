//! The image worker on real QEMUs: what is written into an image is in it.

mod common;

use common::{qemu_img, qemus, with_each_qemu};
use nix::sys::signal::Signal;
use qmp_bridge::disks::ImageFormat;
use qmp_bridge::images::{Backing, BackingMode, ImageError, ImageSpec, ImageWorker, ImageWorkers};
use qmp_bridge::nbd::{NbdError, ZeroMode};
use std::path::Path;
use std::time::{Duration, Instant};

const SIZE: u64 = 64 << 20;

fn spec(path: std::path::PathBuf, format: ImageFormat, backing: Option<&str>) -> ImageSpec {
    let backing = backing.map(|file| Backing { file: file.into(), format: ImageFormat::Qcow2 });
    ImageSpec { path, format, virtual_size: SIZE, backing, layout: None }
}

#[tokio::test]
async fn images_round_trip() {
    with_each_qemu(async |qemu| {
        let directory = tempfile::tempdir().expect("directory");
        let at = |name: &str| directory.path().join(name);
        let mut worker = ImageWorker::start(&qemu, directory.path()).await.expect("worker");
        let types = worker.qmp().query_machine_types().await.expect("types");
        let q35 = types.iter().find(|known| known.alias.as_deref() == Some("q35"));
        assert!(q35.expect("q35").name.starts_with("pc-q35-"));

        worker.create(&spec(at("base.qcow2"), ImageFormat::Qcow2, None)).await.expect("base");
        let base = worker.open(&at("base.qcow2"), ImageFormat::Qcow2, BackingMode::Chain).await.expect("open");
        assert_eq!((base.client.size(), base.client.is_read_only()), (SIZE, false));
        base.client.write(0, vec![0xaa; 1 << 20].into()).await.expect("write");
        worker.close(base).await.expect("close");

        worker.create(&spec(at("top.qcow2"), ImageFormat::Qcow2, Some("base.qcow2"))).await.expect("top");
        let top = worker.open(&at("top.qcow2"), ImageFormat::Qcow2, BackingMode::Chain).await.expect("open");
        // A part of a cluster: the rest must show the base.
        top.client.write(4096, vec![0xbb; 4096].into()).await.expect("write");
        top.client.write_zeroes(512 << 10, 64 << 10, ZeroMode::Allocated).await.expect("zeroes");
        let writes = (0..64u64).map(|n| top.client.write((2 << 20) + n * 65_536, vec![n as u8 + 1; 65_536].into()));
        futures::future::try_join_all(writes).await.expect("concurrent writes");
        let out = top.client.read(SIZE - 1, 2).await;
        assert!(matches!(out, Err(NbdError::Bounds { .. })), "{out:?}");
        worker.close(top).await.expect("close");

        // A full one of the same content, raw.
        worker.create(&spec(at("flat.img"), ImageFormat::Raw, None)).await.expect("raw");
        let flat = worker.open(&at("flat.img"), ImageFormat::Raw, BackingMode::Chain).await.expect("open");
        flat.client.write(0, vec![0xaa; 1 << 20].into()).await.expect("write");
        flat.client.write(4096, vec![0xbb; 4096].into()).await.expect("write");
        flat.client.write_zeroes(512 << 10, 64 << 10, ZeroMode::Hole).await.expect("zeroes");
        for n in 0..64u64 {
            flat.client.write((2 << 20) + n * 65_536, vec![n as u8 + 1; 65_536].into()).await.expect("write");
        }
        flat.client.trim(32 << 20, 16 << 20).await.expect("trim");
        assert_eq!(flat.client.read(4000, 200).await.expect("read")[..97], [vec![0xaa; 96], vec![0xbb]].concat()[..]);
        worker.close(flat).await.expect("close");
        qemu_img(&qemu, directory.path(), &["compare", "-q", "-f", "qcow2", "-F", "raw", "top.qcow2", "flat.img"]);
        qemu_img(&qemu, directory.path(), &["check", "-q", "top.qcow2"]);

        // An overlay on something that is not there yet.
        let remote = r#"json:{"driver":"qcow2","file":{"driver":"nbd","server":{"type":"unix","path":"/none"},"export":"x"}}"#;
        worker.create(&spec(at("lazy.qcow2"), ImageFormat::Qcow2, Some(remote))).await.expect("lazy");
        let lazy = worker.open(&at("lazy.qcow2"), ImageFormat::Qcow2, BackingMode::Alone).await.expect("open");
        lazy.client.write(0, vec![1; 65_536].into()).await.expect("write");
        worker.close(lazy).await.expect("close");
        let opened = worker.open(&at("lazy.qcow2"), ImageFormat::Qcow2, BackingMode::Chain).await;
        assert!(matches!(opened, Err(ImageError::Open { .. })), "{opened:?}");

        let again = worker.create(&spec(at("flat.img"), ImageFormat::Raw, None)).await;
        assert!(again.as_ref().is_err_and(|error| error.to_string().contains("exists")), "{again:?}");
        let wrong = worker.create(&spec(at("w.img"), ImageFormat::Raw, Some("base.qcow2"))).await;
        assert!(wrong.is_err() && !at("w.img").exists());
        worker.shutdown().await.expect("shutdown");
    })
    .await;
}

/// Makes and fills one image; the first `losses` workers are killed in the middle of it. Counts the
/// calls.
async fn fill_in_spite_of(
    workers: &mut ImageWorkers,
    path: &Path,
    losses: u32,
    calls: &mut u32,
) -> Result<(), ImageError> {
    workers
        .run(async |worker: &mut ImageWorker| {
            *calls += 1;
            let _ = std::fs::remove_file(path);
            worker.create(&spec(path.into(), ImageFormat::Qcow2, None)).await?;
            let image = worker.open(path, ImageFormat::Qcow2, BackingMode::Chain).await?;
            if *calls <= losses {
                signal(worker, Signal::SIGKILL);
            }
            image.client.write(0, vec![*calls as u8; 65_536].into()).await?;
            worker.close(image).await
        })
        .await
}

fn signal(worker: &ImageWorker, signal: Signal) {
    let pid = nix::unistd::Pid::from_raw(worker.pid().expect("it runs").cast_signed());
    nix::sys::signal::kill(pid, signal).expect("it is ours");
}

#[tokio::test]
async fn a_worker_that_dies_is_replaced() {
    with_each_qemu(async |qemu| {
        let directory = tempfile::tempdir().expect("directory");
        let path = directory.path().join("a.qcow2");
        let mut workers = ImageWorkers::new(&qemu, directory.path());
        let mut calls = 0;
        fill_in_spite_of(&mut workers, &path, 2, &mut calls).await.expect("the third worker lives");
        assert_eq!(calls, 3);
        let other = directory.path().join("b.qcow2");
        let mut calls = 0;
        fill_in_spite_of(&mut workers, &other, 3, &mut calls)
            .await
            .expect_err("that was the last try");
        assert_eq!(calls, 3);
        workers.shutdown().await;
        qemu_img(&qemu, directory.path(), &["check", "-q", "a.qcow2"]);
        let mut workers = ImageWorkers::new(&qemu, directory.path());
        let first = workers
            .run(async |worker: &mut ImageWorker| read_first(worker, &path).await)
            .await
            .expect("readable");
        assert_eq!(first, 3, "what the third worker wrote");
        workers.shutdown().await;
    })
    .await;
}

async fn read_first(worker: &mut ImageWorker, path: &Path) -> Result<u8, ImageError> {
    let image = worker.open(path, ImageFormat::Qcow2, BackingMode::Chain).await?;
    let first = image.client.read(0, 1).await?[0];
    worker.close(image).await?;
    Ok(first)
}

#[tokio::test]
async fn a_worker_that_hangs_is_replaced() {
    let directory = tempfile::tempdir().expect("directory");
    let mut workers = ImageWorkers::new(&qemus()[0], directory.path());
    let mut pids = Vec::new();
    let work = async |worker: &mut ImageWorker| {
        pids.push(worker.pid().expect("it runs"));
        if pids.len() == 1 {
            signal(worker, Signal::SIGSTOP);
            return Err(ImageError::Exit);
        }
        Ok(())
    };
    workers.run(work).await.expect("the second worker answers");
    workers.shutdown().await;
    assert_ne!(pids[0], pids[1]);
    // A signal ends even a stopped process; no other thread has waited for this child process.
    let status = std::fs::read_to_string(format!("/proc/{}/stat", pids[0])).unwrap_or_default();
    assert!(status.is_empty() || status.contains(") Z "), "the first worker still is: {status}");
}

/// What fails for another reason is not tried again.
#[tokio::test]
async fn a_worker_that_answers_is_kept() {
    with_each_qemu(async |qemu| {
        let directory = tempfile::tempdir().expect("directory");
        let mut workers = ImageWorkers::new(&qemu, directory.path());
        let mut pids = Vec::new();
        for _ in 0..2 {
            let wrong = spec(directory.path().join("none/a.qcow2"), ImageFormat::Qcow2, None);
            let refused = workers
                .run(async |worker: &mut ImageWorker| {
                    pids.push(worker.pid());
                    worker.create(&wrong).await
                })
                .await;
            assert!(matches!(refused, Err(ImageError::Create { .. })), "{refused:?}");
        }
        assert!(pids.len() == 2 && pids[0].is_some() && pids[0] == pids[1], "{pids:?}");
        workers.shutdown().await;
    })
    .await;
}

#[tokio::test]
async fn a_worker_that_does_not_start_is_quoted() {
    let directory = tempfile::tempdir().expect("directory");
    let script = directory.path().join("qemu");
    std::fs::write(&script, "#!/bin/sh\necho no such VM >&2\nexit 1\n").expect("script");
    std::fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755))
        .expect("mode");
    let begun = Instant::now();
    let error = ImageWorker::start(&script, directory.path()).await.expect_err("it ends at once");
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    assert!(error.to_string().contains("no such VM"), "{error}");
    let mut workers = ImageWorkers::new(&directory.path().join("none"), directory.path());
    let error = workers
        .run(async |_: &mut ImageWorker| Ok::<(), ImageError>(()))
        .await
        .expect_err("no such program");
    assert!(matches!(error, ImageError::Start { .. }), "{error}");
}
