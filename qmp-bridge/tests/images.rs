//! The image worker on real QEMUs: what is written into an image is in it.

mod common;

use common::{qemu_img, with_each_qemu};
use qmp_bridge::disks::ImageFormat;
use qmp_bridge::images::{Backing, BackingMode, ImageError, ImageSpec, ImageWorker};
use qmp_bridge::machine::{machine_types, resolve};
use qmp_bridge::nbd::{NbdError, ZeroMode};

const SIZE: u64 = 64 << 20;

fn spec(path: std::path::PathBuf, format: ImageFormat, backing: Option<&str>) -> ImageSpec {
    let backing = backing.map(|file| Backing { file: file.into(), format: ImageFormat::Qcow2 });
    ImageSpec { path, format, virtual_size: SIZE, backing }
}

#[tokio::test]
async fn images_round_trip() {
    with_each_qemu(async |qemu| {
        let directory = tempfile::tempdir().expect("directory");
        let at = |name: &str| directory.path().join(name);
        let mut worker = ImageWorker::start(&qemu, directory.path()).await.expect("worker");
        let types = machine_types(worker.qmp()).await.expect("types");
        assert!(resolve(&types, Some("q35")).expect("q35").name.starts_with("pc-q35-"));

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
