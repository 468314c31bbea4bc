//! Not a test but a measurement, of Linux in a directory that `scripts/guest-image --vm` furnished,
//! or of the counting guest:
//! `STILLPOINT_FIGURES=/tmp/m1 cargo test -p qmp-bridge --test migration --release -- --ignored --nocapture
//! figures`.

use std::path::Path;
use std::time::{Duration, Instant};

use qmp_bridge::migration::StreamOptions;

use super::common::{TestQemu, with_each_qemu};
use super::vm::{FEW, modes, start, stream};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes minutes"]
async fn figures() {
    let number = |name: &str, default: u64| {
        std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
    };
    let (passes, megabytes) =
        (number("STILLPOINT_FIGURES_PASSES", 10), number("STILLPOINT_FIGURES_MIB", 1024));
    let furnished = std::env::var("STILLPOINT_FIGURES").ok();
    for backend in ["none", "memory-backend-ram", "memory-backend-memfd,share=on"] {
        with_each_qemu(async |qemu| {
            let memory = megabytes.to_string();
            let object = format!("{backend},id=memory,size={memory}M");
            let mut more = vec!["-m", &memory];
            if backend != "none" {
                more.extend(["-object", &object, "-machine", "memory-backend=memory"]);
            }
            let vm = match &furnished {
                Some(from) => start_linux(&qemu, Path::new(from), &more).await,
                None => start(&qemu, FEW, &more).await,
            };
            for &mode in modes(&vm) {
                eprintln!("{mode}, {megabytes} MiB, backend {backend}, resident {}", resident(&vm));
                let mut pauses = Vec::new();
                for id in 1..=passes {
                    let begun = Instant::now();
                    let (pause, bytes, captured) =
                        stream(&vm, &vm.qmp, mode, &StreamOptions::default(), id).await;
                    eprintln!(
                        "    stream {:.0?} {} KiB, resident {}",
                        begun.elapsed(),
                        bytes >> 10,
                        resident(&vm)
                    );
                    captured.restore().await.expect("restore");
                    pauses.push(pause);
                    tokio::time::sleep(Duration::from_millis(300)).await;
                }
                pauses.sort();
                eprintln!(
                    "  pause p50 {:.1?} max {:.1?}",
                    pauses[pauses.len() / 2],
                    pauses[pauses.len() - 1]
                );
            }
        })
        .await;
    }
}

async fn start_linux(qemu: &Path, furnished: &Path, more: &[&str]) -> TestQemu {
    let directory = tempfile::tempdir_in("/dev/shm").expect("directory");
    let list = std::fs::read_dir(furnished).expect("a furnished directory");
    for entry in list {
        let entry = entry.expect("entry");
        std::fs::copy(entry.path(), directory.path().join(entry.file_name())).expect("copy");
    }
    let mut arguments =
        vec!["-readconfig", "q35-virtio.cfg", "-accel", "tcg", "-serial", "file:serial.log"];
    arguments.extend(more);
    let vm = TestQemu::start_in(qemu, &arguments, directory).await;
    let deadline = Instant::now() + Duration::from_secs(120);
    while !std::fs::read_to_string(vm.path("serial.log"))
        .unwrap_or_default()
        .contains("WITNESS step=")
    {
        assert!(Instant::now() < deadline, "Linux does not come up");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    tokio::time::sleep(Duration::from_secs(3)).await;
    vm
}

fn resident(vm: &TestQemu) -> String {
    let status = std::fs::read_to_string(format!("/proc/{}/status", vm.pid())).unwrap_or_default();
    let line = |name: &str| {
        status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or("?").trim().to_owned()
    };
    format!("{} (page tables {})", line("VmRSS:"), line("VmPTE:"))
}
