//! Where people's VMs are: domains of a real libvirt (`scripts/libvirt-dev`), a QEMU as Proxmox VE
//! starts it, and the service files. The snippets of docs/libvirt.md and docs/proxmox.md are those
//! used here.

use checkpoint_format::CheckpointId;
use engine::checkpoint::outcome::{Kind, Outcome};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};
use stillpoint_tests::{
    Domain, Lab, Libvirt, Recipe, Shape, Taken, built, kill_hard, newest_qemu, on_each_qemu,
    project, wait_until,
};

const TIMEOUT: Duration = Duration::from_secs(60);
/// libvirt itself needs about half a second for a domain; a hook must not add what a person would
/// notice.
const START_WITH_HOOK: Duration = Duration::from_secs(15);

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

fn checkpoint(lab: &Lab, domain: &Domain) -> Taken {
    let before = domain.step();
    let outcome: Outcome =
        serde_json::from_value(checkpoint_of(lab, &domain.name)).expect("the documented form");
    Taken { name: format!("{}@{}", domain.name, outcome.id), outcome, before, after: domain.step() }
}

fn checkpoint_of(lab: &Lab, name: &str) -> Value {
    lab.run(&["checkpoint", name, "--json"]).expect_success().json()
}

/// No preparation but the second monitor: memory comes by QEMU's own migration stream, and libvirt
/// keeps its domain.
#[test]
fn a_domain_is_checkpointed_by_its_second_monitor() {
    on_each_qemu(|qemu| {
        let lab = Lab::new(qemu);
        let libvirt = Libvirt::up(&lab);
        let domain = libvirt.start("web1", Shape { shared_memory: false }, &[]);
        domain.wait_for_witness();
        lab.run(&[
            "attach",
            "--qmp",
            text(&domain.monitor()),
            "--store",
            lab.store(),
            "--name",
            "web1",
        ])
        .expect_success();

        checkpoint(&lab, &domain);
        libvirt.virsh(&["suspend", "web1"]);
        assert_eq!(domain.state(), "paused");
        libvirt.virsh(&["resume", "web1"]);
        checkpoint(&lab, &domain);
        domain.assert_makes_progress();
        let last = checkpoint(&lab, &domain);
        assert_eq!(
            (last.outcome.parent, last.outcome.kind),
            (Some(CheckpointId(2)), Kind::Incremental),
            "{:?}",
            last.outcome
        );

        // libvirt has noticed nothing that it would act upon.
        assert_eq!(domain.state(), "running");
        assert!(libvirt.virsh(&["dominfo", "web1"]).contains("running"));
        libvirt.virsh(&["suspend", "web1"]);
        libvirt.virsh(&["resume", "web1"]);
        domain.assert_makes_progress();
        libvirt.virsh(&["shutdown", "web1"]);
        domain.destroy();
        assert!(
            wait_until(TIMEOUT, || domain.helper().is_none()),
            "the helper outlives its domain"
        );

        let restored = lab.restore(&last.name, "web2", &[]);
        restored.assert_continues(&last);
    });
}

/// The plugin by `<qemu:commandline>`: the tracker follows the domain's memory, and the hook
/// attaches and lets go.
#[test]
fn the_hook_attaches_a_domain_that_has_the_plugin() {
    let mut lab = Lab::new(&newest_qemu());
    let libvirt = Libvirt::up_with_hook(&mut lab);
    let lab = libvirt.lab();
    libvirt.configure("db1", "");
    let plugin = format!(
        "file={},socket={}",
        libvirt.plugin().display(),
        lab.path().join("db1.plugin").display()
    );
    let words = ["-plugin".to_owned(), plugin];
    let domain = libvirt.start("db1", Shape { shared_memory: true }, &words);
    assert!(
        wait_until(TIMEOUT, || answers(lab, "db1")),
        "the hook attaches no helper: {:?}",
        libvirt.hook_log("db1")
    );
    let helper = domain.helper();

    domain.wait_for_witness();
    let first = checkpoint(lab, &domain);
    assert_eq!(first.outcome.engine, "tracker");
    // A restarted libvirtd finds its domains again and calls the hook for each.
    libvirt.restart();
    assert_eq!(domain.state(), "running");
    let last = checkpoint(lab, &domain);
    assert_eq!(last.outcome.parent, Some(first.outcome.id));
    assert_eq!(domain.helper(), helper, "the helper is another now: {:?}", libvirt.hook_log("db1"));

    domain.destroy();
    assert!(wait_until(TIMEOUT, || domain.helper().is_none()), "the helper outlives its domain");
    // As on another host: there the directory belongs to the user who restores.
    std::os::unix::fs::chown(lab.runtime(), Some(0), Some(0)).expect("root runs this");
    lab.restore(&last.name, "db2", &[]).assert_continues(&last);
}

/// The helper takes requests.
fn answers(lab: &Lab, name: &str) -> bool {
    UnixStream::connect(lab.runtime().join(name).join("control.sock")).is_ok()
}

/// Whatever is wrong with a domain's configuration, its start neither fails nor waits.
#[test]
fn the_hook_is_in_nobodys_way() {
    let mut lab = Lab::new(&newest_qemu());
    let libvirt = Libvirt::up_with_hook(&mut lab);
    // The file is read by a shell where there is no service manager.
    libvirt.configure("broken", "sleep 30\nif (\n");
    for name in ["broken", "unknown"] {
        let begun = Instant::now();
        let domain = libvirt.start(name, Shape { shared_memory: false }, &[]);
        assert!(begun.elapsed() < START_WITH_HOOK, "{name} took {:?} to start", begun.elapsed());
        assert_eq!(domain.state(), "running", "{name}");
        let begun = Instant::now();
        domain.destroy();
        assert!(begun.elapsed() < START_WITH_HOOK, "{name} took {:?} to end", begun.elapsed());
    }
    assert!(libvirt.hook_log("broken").is_some(), "the hook did not even try");
    assert_eq!(libvirt.hook_log("unknown"), None, "a domain that is not configured was attached");
}

/// What systemd says about the files that `make install` puts in place.
#[test]
fn the_service_files_are_understood_by_systemd() {
    let prefix = tempfile::tempdir().expect("a directory");
    let release = built().parent().expect("a directory");
    let mut make = Command::new("make");
    make.args(["-s", "install"])
        .arg(format!("RELEASE={}", release.display()))
        .arg(format!("PREFIX={}", prefix.path().display()));
    let output = make.current_dir(project()).output().expect("make can be run");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let units = prefix.path().join("lib/systemd/system");
    let files: Vec<PathBuf> = std::fs::read_dir(&units)
        .expect("make put it there")
        .map(|entry| entry.expect("an entry").path())
        .collect();
    assert_eq!(files.len(), 3, "{files:?}");
    for file in files {
        let installed = std::fs::read_to_string(&file).expect("make put it there");
        assert!(
            !installed.contains("/usr/local/"),
            "{} does not know where it was installed",
            file.display()
        );
        let output =
            Command::new("systemd-analyze").args(["verify", "--man=no"]).arg(&file).output();
        let output = output.expect("systemd-analyze can be run; scripts/install-deps installs it");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && said.is_empty(), "{}: {said}", file.display());
    }
}

/// As the unit starts it.
#[test]
fn service_helper_tells_systemd_when_it_is_attached_and_when_it_ends() {
    let lab = Lab::new(&newest_qemu());
    let vm = lab.start("m", &Recipe::scribbler(45));
    kill_hard(vm.wait_for_helper());
    let systemd = lab.path().join("notify");
    let socket = UnixDatagram::bind(&systemd).expect("a socket");
    socket.set_read_timeout(Some(TIMEOUT)).expect("a timeout");
    let told = || {
        let mut said = [0; 256];
        let length = socket.recv(&mut said).expect("the helper tells");
        String::from_utf8_lossy(&said[..length]).into_owned()
    };
    let mut helper = lab.command(&["attach", "--foreground", "m"]);
    let mut helper = helper.env("NOTIFY_SOCKET", &systemd).spawn().expect("it starts");
    assert_eq!(told(), "READY=1\nSTATUS=attached to m\n");
    lab.run(&["checkpoint", "m"]).expect_success();
    kill(Pid::from_raw(helper.id().cast_signed()), Signal::SIGTERM).expect("it runs");
    assert_eq!(told(), "STOPPING=1\n");
    assert!(helper.wait().expect("it ends").success());
}

// ---- Proxmox VE

/// What `qm showcmd` prints for a linked clone, without what only Proxmox's own QEMU knows (`-id`,
/// the `+pve` machine types), what needs its host (tap, iscsi, the boot splash, `-daemonize`) and
/// the flags of KVM. `disk` is the disk's part of it.
fn proxmox(qemu: &Path, lab: &Lab, disk: &str) -> Recipe {
    // From QEMU 9.2 on it is in milliseconds.
    let reconnect = if has_iothreads(qemu) { "reconnect-ms=5000" } else { "reconnect=5" };
    let vm = format!(
        "-name vm100,debug-threads=on -no-shutdown \
         -chardev socket,id=qmp,path=100.qmp,server=on,wait=off -mon chardev=qmp,mode=control \
         -chardev socket,id=qmp-event,path=qmeventd.sock,{reconnect} -mon chardev=qmp-event,mode=control \
         -smbios type=1,uuid=3dd750ce-d910-44d0-9493-525c0be4e687 -smp 2,sockets=1,cores=2,maxcpus=2 -nodefaults \
         -boot menu=on,strict=on,reboot-timeout=1000 -vnc unix:100.vnc,password=on -cpu qemu64 \
         -global PIIX4_PM.disable_s3=1 -global PIIX4_PM.disable_s4=1 \
         -device pci-bridge,id=pci.1,chassis_nr=1,bus=pci.0,addr=0x1e -device pci-bridge,id=pci.2,chassis_nr=2,bus=pci.0,addr=0x1f \
         -device pci-bridge,id=pci.3,chassis_nr=3,bus=pci.0,addr=0x5 -device vmgenid,guid=54d1c06c-8f5b-440f-b5b2-6eab1380e13d \
         -device piix3-usb-uhci,id=uhci,bus=pci.0,addr=0x1.0x2 -device usb-tablet,id=tablet,bus=uhci.0,port=1 \
         -device VGA,id=vga,bus=pci.0,addr=0x2 -chardev socket,path=100.qga,server=on,wait=off,id=qga0 \
         -device virtio-serial,id=qga0,bus=pci.0,addr=0x8 -device virtserialport,chardev=qga0,name=org.qemu.guest_agent.0 \
         -device virtio-balloon-pci,id=balloon0,bus=pci.0,addr=0x3,free-page-reporting=on \
         -drive if=none,id=drive-ide2,media=cdrom -device ide-cd,bus=ide.1,unit=0,drive=drive-ide2,id=ide2,bootindex=101 \
         -netdev type=user,id=net0 -device virtio-net-pci,mac=2E:01:68:F9:9C:87,netdev=net0,bus=pci.0,addr=0x12,id=net0,bootindex=300"
    );
    // The 'args:' line of the VM's configuration.
    let args = format!("-qmp unix:{},server=on,wait=off", proxmox_monitor(lab).display());
    let words: Vec<&str> = [&vm, disk, &args].into_iter().flat_map(str::split_whitespace).collect();
    Recipe::board("pc").words("witness.journal=/dev/sda witness.base=/dev/sda").arguments(&words)
}

fn proxmox_monitor(lab: &Lab) -> PathBuf {
    lab.path().join("stillpoint-100.qmp")
}

/// Before QEMU 9.0 disks in an iothread are refused.
fn has_iothreads(qemu: &Path) -> bool {
    !Command::new(qemu)
        .arg("--version")
        .output()
        .expect("QEMU can be run")
        .stdout
        .starts_with(b"QEMU emulator version 7.")
}

/// VM versions before 10.0, on Proxmox VE 8 and 9.
const DRIVE: &str = "-drive file=overlay.qcow2,if=none,id=drive-scsi0,cache=none,format=qcow2,detect-zeroes=on \
    -device scsi-hd,bus=virtioscsi0.0,channel=0,scsi-id=0,lun=0,drive=drive-scsi0,id=scsi0,bootindex=100";

/// VM versions from 10.0 on: a throttle node on every disk.
const THROTTLED: &str = r#"-device virtio-scsi-pci,id=virtioscsi0,bus=pci.3,addr=0x1
    -object {"id":"throttle-drive-scsi0","limits":{},"qom-type":"throttle-group"}
    -blockdev {"detect-zeroes":"on","discard":"ignore","driver":"throttle","file":{"cache":{"direct":true,"no-flush":false},"detect-zeroes":"on","discard":"ignore","driver":"qcow2","file":{"aio":"threads","cache":{"direct":true,"no-flush":false},"detect-zeroes":"on","discard":"ignore","driver":"file","filename":"overlay.qcow2","node-name":"e74f4959037afb46eddc7313c43dfdd","read-only":false},"node-name":"f74f4959037afb46eddc7313c43dfdd","read-only":false},"node-name":"drive-scsi0","read-only":false,"throttle-group":"throttle-drive-scsi0"}
    -device scsi-hd,bus=virtioscsi0.0,channel=0,scsi-id=0,lun=0,drive=drive-scsi0,id=scsi0,device_id=drive-scsi0,bootindex=100,write-cache=on"#;

#[test]
fn a_vm_as_proxmox_starts_it_is_attached_by_its_hook() {
    on_each_qemu(|qemu| {
        let lab = Lab::new(qemu);
        let controller = if has_iothreads(qemu) {
            "-object iothread,id=iothread-virtioscsi0 -device virtio-scsi-pci,id=virtioscsi0,bus=pci.3,addr=0x1,iothread=iothread-virtioscsi0"
        } else {
            "-device virtio-scsi-pci,id=virtioscsi0,bus=pci.3,addr=0x1"
        };
        let vm = lab.start_plain("100", &proxmox(qemu, &lab, &format!("{controller} {DRIVE}")));
        let conf = format!(
            "STILLPOINT_QMP={}\nSTILLPOINT_STORE={}\n",
            proxmox_monitor(&lab).display(),
            lab.store()
        );
        std::fs::write(lab.path().join("100.conf"), conf).expect("the test's directory");
        vm.wait_for_witness();

        proxmox_hook(&lab, "pre-start");
        assert!(vm.helper().is_none());
        proxmox_hook(&lab, "post-start");
        assert!(
            wait_until(TIMEOUT, || answers(&lab, "100")),
            "the hook attaches no helper: {}",
            proxmox_log(&lab)
        );
        let mut last = vm.checkpoint();
        for _ in 0..2 {
            vm.assert_makes_progress();
            last = vm.checkpoint();
        }
        proxmox_hook(&lab, "pre-stop");
        assert!(
            wait_until(TIMEOUT, || vm.helper().is_none()),
            "the hook does not let go: {}",
            proxmox_log(&lab)
        );
        vm.assert_makes_progress();
        vm.kill();
        lab.restore(&last.name, "101", &[]).assert_continues(&last);
    });
}

#[test]
fn proxmox_throttle_nodes_are_carried() {
    let qemu = newest_qemu();
    let lab = Lab::new(&qemu);
    let vm = lab.start_plain("100", &proxmox(&qemu, &lab, THROTTLED));
    let monitor = proxmox_monitor(&lab);
    lab.run(&["attach", "--qmp", text(&monitor), "--store", lab.store(), "--name", "100"])
        .expect_success();
    vm.checkpoint();
    assert_eq!(vm.checkpoint().outcome.kind, Kind::Incremental);
    let shown = lab.run(&["show", "100@2", "--json"]).expect_success().json();
    let disk =
        shown["disks"].as_array().into_iter().flatten().find(|disk| disk["read_only"] == false);
    let disk = disk.unwrap_or_else(|| panic!("no writable disk in {shown}"));
    assert_ne!(disk["node"], "drive-scsi0", "the checkpoint is of the node below the filter");
    assert!(
        shown["machine"]["arguments"].to_string().contains("throttle-group"),
        "the filter comes back: {shown}"
    );
    assert!(vm.qmp().is_running());
}

/// As Proxmox calls it: it waits for the hook, and a failure would end a start.
fn proxmox_hook(lab: &Lab, phase: &str) {
    let command = lab.command(&[]);
    let mut hook = Command::new(project().join("scripts/proxmox-hook"));
    hook.args(["100", phase]).env("PATH", search_path());
    hook.envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
    let begun = Instant::now();
    let output = hook
        .env("STILLPOINT_CONFIG_DIR", lab.path())
        .env("STILLPOINT_LOG_DIR", lab.path())
        .output();
    let output = output.expect("the hook can be run");
    assert!(
        output.status.success() && begun.elapsed() < Duration::from_secs(5),
        "{phase}: {output:?} after {:?}",
        begun.elapsed()
    );
}

fn proxmox_log(lab: &Lab) -> String {
    std::fs::read_to_string(lab.path().join("100.log")).unwrap_or_default()
}

fn search_path() -> String {
    let program = built().parent().expect("a directory");
    format!("{}:{}", program.display(), std::env::var("PATH").unwrap_or_default())
}
