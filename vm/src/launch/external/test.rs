//! Real command lines, each argument on a line, as `/proc/PID/cmdline` had them.

use super::super::arguments::words;
use super::*;
use crate::error::{Class, class_of};
use qemu_cmdline::unsupported as table;
use qmp_bridge::qmp::QemuVersion;
use qmp_bridge::vm::Accelerator;
use std::path::Path;

const LIBVIRT_7: &str = include_str!("../fixtures/libvirt-7.2.txt");
const LIBVIRT_10: &str = include_str!("../fixtures/libvirt-10.0.txt");
const PROXMOX: &str = include_str!("../fixtures/proxmox-8.txt");
const DEFAULT_RAM: u64 = 256 << 20;

struct Case<'a> {
    machine_type: &'a str,
    ram_bytes: u64,
    block: &'a str,
    accelerator: Accelerator,
    directory: &'a Path,
    monitor: &'a str,
}

impl Default for Case<'_> {
    fn default() -> Self {
        Self {
            machine_type: "pc-q35-7.2",
            ram_bytes: DEFAULT_RAM,
            block: "pc.ram",
            accelerator: Accelerator::Tcg,
            directory: Path::new("/vm"),
            monitor: "/vm/qmp.sock",
        }
    }
}

impl Case<'_> {
    fn read(&self, arguments: &[String]) -> Result<ExternalVm> {
        let facts = VmFacts {
            qemu: QemuVersion { major: 7, minor: 2, micro: 22, package: String::new() },
            machine_type: self.machine_type.to_owned(),
            default_ram_id: Some("pc.ram".to_owned()),
            ram_backend: None,
            vcpus: 1,
            ram_bytes: self.ram_bytes,
            plugged_bytes: 0,
            accelerator: self.accelerator,
            migration_blockers: Vec::new(),
        };
        let known = |name: &str, alias: Option<&str>, is_default| MachineType {
            name: name.to_owned(),
            alias: alias.map(str::to_owned),
            default_ram_id: Some("pc.ram".to_owned()),
            is_default,
        };
        let types = [
            known("pc-i440fx-7.2", Some("pc"), true),
            known("pc-q35-7.2", Some("q35"), false),
            known("pc-q35-10.0", None, false),
        ];
        let block = RamBlock {
            name: self.block.to_owned(),
            page_size: 4096,
            offset: 0,
            used: self.ram_bytes,
            total: self.ram_bytes,
            host: None,
            read_only: None,
        };
        let hold = Hold {
            monitor: Path::new(self.monitor),
            directory: self.directory,
            tap: &|descriptor| (descriptor == "35").then(|| "vnet3".to_owned()),
            fd_path: &|path| (path == "/dev/fdset/0").then(|| PathBuf::from("/srv/m72/serial.log")),
        };
        parse(arguments, &hold, &Said { facts: &facts, types: &types, blocks: &[block] })
    }

    fn file(&self, text: &str) -> (ExternalVm, String) {
        let arguments: Vec<String> = text.lines().skip(1).map(str::to_owned).collect();
        told(self.read(&arguments).unwrap())
    }

    fn line(&self, line: &str) -> Result<(ExternalVm, String)> {
        Ok(told(self.read(&line.split(' ').map(str::to_owned).collect::<Vec<_>>())?))
    }
}

fn told(found: ExternalVm) -> (ExternalVm, String) {
    let line = words(&found.options).join(" ");
    (found, line)
}

fn has(line: &str, parts: &[&str]) {
    parts.iter().for_each(|part| assert!(line.contains(part), "'{part}' is not in: {line}"));
}

fn lacks(line: &str, parts: &[&str]) {
    parts.iter().for_each(|part| assert!(!line.contains(part), "'{part}' is in: {line}"));
}

#[test]
fn a_plain_vm() {
    let case = Case { machine_type: "pc-i440fx-7.2", ..Case::default() };
    let (found, line) = case
        .line(
            "-m 256 -accel tcg,thread=multi -drive file=a.qcow2,if=virtio -hdb b.img -S -pidfile /run/p -daemonize -D /tmp/log -d guest_errors \
             -name guest=web,process=x,debug-threads=on -qmp unix:qmp.sock,server=on,wait=off -qmp unix:/run/other.qmp,server=on,wait=off \
             -monitor stdio -serial pty -incoming defer -loadvm old -no-hpet -no-shutdown -s",
        )
        .unwrap();
    assert_eq!(
        line,
        "-m 256 -drive file=a.qcow2,if=virtio,node-name=sp-drive0 -drive index=1,media=disk,file=b.img,node-name=sp-drive1 -name guest=web \
         -qmp unix:/run/other.qmp,server=on,wait=off -monitor none -serial pty -machine hpet=off -no-shutdown -machine type=pc-i440fx-7.2"
    );
    assert_eq!(
        (found.accelerator.as_str(), found.ram_bytes, found.ram_block.as_str()),
        ("tcg,thread=multi", DEFAULT_RAM, "pc.ram")
    );
    assert_eq!((found.manager, found.plugin), (None, None));
    let why = |what: &str| {
        found
            .dropped
            .iter()
            .find(|dropped| dropped.what.starts_with(what))
            .map(|dropped| dropped.why)
    };
    assert_eq!(why("-S"), Some("the VM runs already"));
    assert!(
        why("-qmp unix:qmp.sock").is_some_and(|why| why.contains("monitor"))
            && why("-qmp unix:/run/other").is_none()
    );
}

#[test]
fn libvirt_with_a_shared_memfd() {
    let case = Case { monitor: "/srv/m72/stillpoint.qmp", ..Case::default() };
    let (found, line) = case.file(LIBVIRT_7);
    lacks(
        &line,
        &[
            "charmonitor",
            "masterKey0",
            "memory-backend",
            "-S ",
            "-msg",
            "/dev/fdset",
            "fd=",
            "debug-threads",
            "-no-shutdown",
            "stillpoint.qmp",
        ],
    );
    has(
        &line,
        &[
            "-name guest=m72 ",
            "-chardev file,id=charserial0,path=serial.log,append=on",
            "-chardev socket,id=charchannel0,path=charchannel0.sock,server=on,wait=off",
            r#""chardev":"charchannel0""#,
            r#""node-name":"libvirt-2-format""#,
            r#"-netdev {"type":"user","id":"hostnet0"}"#,
            r#"{"driver":"virtio-balloon-pci","id":"balloon0""#,
            "-sandbox on,obsolete=deny",
            "-machine usb=off,dump-guest-core=off ",
            "-machine type=pc-q35-7.2",
        ],
    );
    assert_eq!((found.ram_block.as_str(), found.manager), ("pc.ram", Some(Manager::Libvirt)));
}

#[test]
fn libvirt_on_another_qemu_with_default_memory() {
    let case =
        Case { machine_type: "pc-q35-10.0", monitor: "/srv/p10/stillpoint.qmp", ..Case::default() };
    let (found, line) = case.file(LIBVIRT_10);
    has(
        &line,
        &["-L /opt/stillpoint/qemu-10.0/usr/share/qemu", "-machine type=pc-q35-10.0", "-uuid "],
    );
    lacks(&line, &["memory-backend", "charmonitor", "-accel"]);
    assert_eq!((found.accelerator.as_str(), found.ram_bytes), ("tcg", DEFAULT_RAM));
    assert!(
        found.dropped.iter().any(|dropped| dropped.what.contains("memory-backend-ram")
            && dropped.why.contains("same name"))
    );
}

#[test]
fn proxmox() {
    let case = Case {
        machine_type: "pc-i440fx-7.2",
        ram_bytes: 2 << 30,
        accelerator: Accelerator::Kvm,
        monitor: "/var/run/qemu-server/100.qmp",
        ..Case::default()
    };
    let (found, line) = case.file(PROXMOX);
    lacks(
        &line,
        &[
            "-id 100",
            "100.qmp",
            "-pidfile",
            "-daemonize",
            "-no-shutdown",
            "pve0",
            "qmeventd",
            "-mon ",
        ],
    );
    has(
        &line,
        &[
            "id=drive-scsi0,format=raw,cache=none,aio=io_uring,detect-zeroes=on,node-name=sp-drive-scsi0",
            "-drive if=none,id=drive-ide2,media=cdrom,aio=io_uring -device",
            "ifname=tap100i0",
            "path=/var/run/qemu-server/100.qga",
            "-machine type=pc-i440fx-7.2",
        ],
    );
    assert_eq!((found.accelerator.as_str(), found.manager), ("kvm", Some(Manager::Proxmox)));
}

#[test]
fn taps_that_a_manager_opened_are_named() {
    let case = Case::default();
    let (_, line) = case.line(r#"-M q35 -m 256 -netdev {"type":"tap","fd":"35","vhost":true,"vhostfd":"37","id":"hostnet0"}"#).unwrap();
    has(
        &line,
        &[
            r#"-netdev {"downscript":"no","id":"hostnet0","ifname":"vnet3","script":"no","type":"tap","vhost":true}"#,
        ],
    );
    let (_, line) =
        case.line("-M q35 -m 256 -netdev tap,fds=35:36,id=n,vhost=on,vhostfds=37:38").unwrap();
    has(&line, &["-netdev tap,id=n,ifname=vnet3,script=no,downscript=no,queues=2,vhost=on"]);
    let error = case.line("-M q35 -m 256 -netdev tap,fd=40,id=n").unwrap_err();
    assert!(
        class_of(&error) == Class::Refused && error.to_string().contains("network backend n"),
        "{error}"
    );
    assert!(case.line("-M q35 -m 256 -netdev stream,id=n,addr.type=fd,addr.str=5").is_err());
}

#[test]
fn a_monitor_may_share_its_line_with_a_serial_port() {
    let case = Case::default();
    let (_, line) = case.line("-M q35 -m 256 -chardev stdio,mux=on,id=c -mon chardev=c,mode=readline -serial chardev:c").unwrap();
    has(&line, &["-chardev stdio,mux=on,id=c", "-serial chardev:c"]);
    lacks(&line, &["-mon "]);
    let (_, line) = case
        .line("-M q35 -m 256 -chardev stdio,id=c -mon chardev=c,mode=control -serial pty")
        .unwrap();
    lacks(&line, &["-chardev", "-mon "]);
}

#[test]
fn a_secret_that_is_used_stays() {
    let case = Case::default();
    let key = r#"-object {"qom-type":"secret","id":"masterKey0","format":"raw","file":"/k"}"#;
    let (_, line) =
        case.line(&format!("-M q35 -m 256 {key} -object secret,id=vnc,keyid=masterKey0,data=x -vnc :1,password-secret=vnc")).unwrap();
    has(&line, &["masterKey0", "id=vnc"]);
    let (_, line) = case.line(&format!("-M q35 -m 256 {key}")).unwrap();
    lacks(&line, &["secret"]);
}

#[test]
fn our_plugin_is_found_and_left_out() {
    let case = Case::default();
    let (found, line) =
        case.line("-M q35 -m 256 -plugin file=/usr/lib/libstillpoint_plugin.so,socket=plug.sock -plugin file=/x/other.so").unwrap();
    assert_eq!(found.plugin, Some(PathBuf::from("/vm/plug.sock")));
    has(&line, &["-plugin file=/x/other.so"]);
    lacks(&line, &["stillpoint"]);
}

#[test]
fn a_configuration_is_read_where_the_process_works() {
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(
        directory.path().join("m.cfg"),
        "[machine]\n type = \"q35\"\n[memory]\n size = \"256\"\n[drive \"d\"]\n file = \"a.img\"\n",
    )
    .unwrap();
    let case = Case { directory: directory.path(), ..Case::default() };
    let (_, line) = case.line("-readconfig m.cfg").unwrap();
    has(&line, &["-drive id=d,file=a.img,node-name=sp-d", "-m size=256"]);
    let error = case.line("-readconfig gone.cfg").unwrap_err();
    assert!(
        class_of(&error) == Class::Refused && error.to_string().contains("gone.cfg"),
        "{error}"
    );
}

#[test]
fn another_vm_than_the_command_line_says_is_refused() {
    for (case, line, reason) in [
        (
            Case { machine_type: "pc-i440fx-7.2", ..Case::default() },
            "-M q35 -m 256",
            "means machine type pc-q35-7.2",
        ),
        (Case { ram_bytes: 1 << 30, ..Case::default() }, "-M q35 -m 256", "gives 268435456 bytes"),
        (Case { block: "ram-node0", ..Case::default() }, "-M q35 -m 256", "no RAM block 'pc.ram'"),
        (Case::default(), "-M q35 -m 256 -device vfio-pci,host=1", "vfio-pci"),
        (Case::default(), "-M q35 -m 256 -numa node,memdev=a -numa node,memdev=b", "a, b"),
    ] {
        let error = case.line(line).unwrap_err();
        assert!(
            class_of(&error) == Class::Refused && error.to_string().contains(reason),
            "{line}: {error}"
        );
    }
}

#[test]
fn the_default_network_of_a_vm_from_a_file_is_written_out() {
    let line = |words: &str, said| -> Vec<String> {
        let list: Vec<String> = words.split(' ').map(str::to_owned).collect();
        super::super::arguments::words(&with_default_network(
            arguments::parse(&list).unwrap(),
            said,
        ))
    };
    assert_eq!(line("-netdev user,id=n", false)[2..], ["-net", "nic", "-net", "user"]);
    assert_eq!(line("-netdev user,id=n", true).len(), 2, "the command line itself named a network");
    assert_eq!(line("-m 1G", false).len(), 2, "QEMU's default comes by itself");
}

#[test]
fn unsupported_row_of_an_external_vm_is_refused() {
    let case = Case::default();
    let rows = table::ROWS.iter().filter(|row| row.is_refused_by(Command::Attach));
    for line in rows.flat_map(table::examples) {
        let error = case.line(&line).expect_err(&line);
        assert_eq!(class_of(&error), Class::Refused, "{line}: {error:#}");
    }
}
