use super::*;
use crate::arguments::{parse, words};

fn options(line: &str) -> Vec<QemuOption> {
    parse(&line.split(' ').map(str::to_owned).collect::<Vec<_>>()).unwrap()
}

const CARRIED: Carried<'_> = Carried {
    is_disk: &|path| path == "d.img",
    is_boot_file: &|path| path == "k",
    is_qemus_own: &|name| name != "x.bin",
};

fn mapped(line: &str, map: &[(&str, &str)]) -> Mapped {
    let wishes = Wishes {
        map: map.iter().map(|(old, new)| ((*old).to_owned(), (*new).to_owned())).collect(),
        allow: Vec::new(),
    };
    super::map(options(line), &wishes)
}

fn open(line: &str, map: &[(&str, &str)], allow: &[&str]) -> Vec<String> {
    let allow: Vec<String> = allow.iter().map(|text| (*text).to_owned()).collect();
    let mut mapped = mapped(line, map);
    mapped.drop_data_directories(&allow);
    mapped.relocate(&allow);
    mapped.check(&CARRIED, &allow).0.iter().map(Finding::allowance).collect()
}

#[test]
fn ordinary_vms_need_nothing() {
    for line in [
        "-m 1G -smp 2 -drive file=d.img,if=virtio -nic user -device virtio-rng-pci -nodefaults -display none",
        "-netdev user,id=n,hostfwd=tcp::2222-:22 -device e1000,netdev=n,mac=52:54:00:00:00:01",
        "-netdev tap,id=n,ifname=tap0,script=no,downscript=no -kernel k -append root=/dev/sda -bios bios-256k.bin",
        "-serial file:/var/log/vm.log -qmp unix:/run/vm/q.sock,server=on,wait=off -monitor none -pidfile /run/x.pid",
        "-object rng-random,id=r,filename=/dev/urandom -object iothread,id=t -vnc 127.0.0.1:1 -vnc unix:/run/v.sock",
        "-vnc :1 -spice port=5900 -monitor none -serial vc",
        "-L /opt/qemu/share -chardev socket,id=qga,path=/run/qga,server=on,wait=off -cpu host,-vmx -rtc base=utc",
    ] {
        assert_eq!(open(line, &[], &[]), Vec::<String>::new(), "{line}");
    }
}

#[test]
fn hostile_command_lines_are_refused() {
    for (line, what) in [
        ("-netdev tap,id=n,script=/tmp/evil", "netdev.script=/tmp/evil"),
        ("-netdev tap,id=n,script=no,downscript=/tmp/evil", "netdev.downscript=/tmp/evil"),
        ("-netdev tap,id=n", "netdev.script=/etc/qemu-ifup"),
        ("-netdev tap,id=n,helper=/bin/sh", "netdev.helper=/bin/sh"),
        ("-netdev bridge,id=n,br=br0,helper=/x", "netdev.helper=/x"),
        ("-netdev bridge,id=n", "netdev.type=bridge"),
        (r#"-netdev {"type":"tap","id":"n","script":"/x"}"#, "netdev.script=/x"),
        ("-nic tap,script=/x", "nic.script=/x"),
        ("-net tap,script=/x", "net.script=/x"),
        (
            "-netdev user,id=n,guestfwd=tcp:10.0.2.9:1-cmd:id",
            "netdev.guestfwd=tcp:10.0.2.9:1-cmd:id",
        ),
        ("-netdev user,id=n,smb=/", "netdev.smb=/"),
        ("-netdev user,id=n,tftp=/etc", "netdev.tftp=/etc"),
        ("-netdev passt,id=n,path=/x", "netdev.path=/x"),
        ("-plugin /x.so", "plugin.file=/x.so"),
        ("-plugin file=x.so,a=b", "plugin.file=x.so"),
        ("-incoming exec:id", "incoming=exec:id"),
        ("-loadvm x", "loadvm=x"),
        ("-readconfig /x", "readconfig=/x"),
        ("-set drive.d.file=/x", "set=drive.d.file=/x"),
        ("-monitor tcp::1,server", "monitor=tcp::1,server"),
        ("-qmp tcp:127.0.0.1:1", "qmp=tcp:127.0.0.1:1"),
        ("-gdb tcp::1", "gdb=tcp::1"),
        ("-s", "s"),
        ("-vnc :0 -monitor vc", "vnc=:0"),
        ("-spice port=1 -serial mon:vc", "spice.port=1"),
        ("-vnc 0.0.0.0:0 -chardev vc,id=v -mon chardev=v", "vnc=0.0.0.0:0"),
        ("-fsdev local,id=f,path=/,security_model=none", "fsdev.path=/"),
        ("-virtfs local,path=/,mount_tag=t,security_model=none", "virtfs.path=/"),
        ("-chroot /", "chroot=/"),
        ("-run-with chroot=/x", "run-with.chroot=/x"),
        ("-daemonize", "daemonize"),
        ("-drive file=/etc/shadow,format=raw", "drive.file=/etc/shadow"),
        ("-drive file=nbd:h:1", "drive.file=nbd:h:1"),
        ("-blockdev driver=file,filename=/etc/shadow,node-name=x", "blockdev.filename=/etc/shadow"),
        (
            r#"-drive file=json:{"driver":"raw",,"file":{"filename":"/x"}}"#,
            "drive.file.file.filename=/x",
        ),
        ("-hda /x", "hda=/x"),
        ("-kernel /boot/vmlinuz", "kernel=/boot/vmlinuz"),
        ("-bios /x", "bios=/x"),
        ("-fw_cfg name=x,file=/etc/shadow", "fw_cfg.file=/etc/shadow"),
        ("-acpitable file=k:/etc/shadow", "acpitable.file=/etc/shadow"),
        ("-device loader,file=/x", "device.file=/x"),
        ("-global e1000.romfile=/x", "global.romfile=/x"),
        ("-device usb-host,hostbus=1", "device.driver=usb-host"),
        ("-device vfio-pci,host=1", "device.driver=vfio-pci"),
        ("-device something,new=/x", "device.new=/x"),
        ("-object input-linux,id=i,evdev=/dev/input/event0", "object.evdev=/dev/input/event0"),
        ("-object secret,id=s,file=/etc/shadow", "object.file=/etc/shadow"),
        ("-object tls-creds-x509,id=t,dir=/etc/pki", "object.dir=/etc/pki"),
        ("-object strange,id=s", "object.qom-type=strange"),
        ("-tpmdev passthrough,id=t,path=/dev/tpm0", "tpmdev.path=/dev/tpm0"),
        ("-chardev socket,id=c,path=/run/docker.sock", "chardev.path=/run/docker.sock"),
        ("-serial unix:/run/docker.sock", "serial.path=/run/docker.sock"),
        ("-serial /dev/ttyS0", "serial=/dev/ttyS0"),
        ("-chardev file,id=c,path=x,input-path=/etc/shadow", "chardev.input-path=/etc/shadow"),
        ("-trace events=/x", "trace.events=/x"),
        ("-unheard /x", "unheard=/x"),
        ("-k ../x", "k=../x"),
        ("-mem-path /x", "mem-path=/x"),
        ("-netdev {'type':'bridge','id':'n'}", "netdev={'type':'bridge','id':'n'}"),
        ("-device {'driver':'usb-host'}", "device={'driver':'usb-host'}"),
        ("-drive file=json:{'driver':'nbd'}", "drive.file=json:{'driver':'nbd'}"),
        ("-newflag -plugin", "newflag=-plugin"),
        ("-vnc vnc=0:1 -monitor vc", "vnc=0:1"),
        ("-blockdev driver=rbd,pool=p,image=i,node-name=x", "blockdev.driver=rbd"),
        (
            "-blockdev nbd,server.type=inet,server.host=h,server.port=1,node-name=x",
            "blockdev.server.host=h",
        ),
        ("-tpmdev passthrough,id=t", "tpmdev.type=passthrough"),
        ("-display spice-app", "display.type=spice-app"),
        ("-netdev tap,id=n,script=no,script=/x", "netdev.script=/x"),
        (
            "-chardev socket,id=c,host=0,port=1,server=on -object monitor-qmp,id=m,chardev=c",
            "chardev.port=1",
        ),
    ] {
        let found = open(line, &[], &[]);
        assert!(found.contains(&what.to_owned()), "{line}: {found:?}");
        let allowed = open(line, &[], &[what]);
        assert!(!allowed.contains(&what.to_owned()), "{line}: {allowed:?}");
    }
}

#[test]
fn what_the_user_names_is_handed_over() {
    let line = "-netdev tap,id=n,ifname=t0,script=/old,downscript=no";
    assert_eq!(open(line, &[("/old", "/etc/mine")], &[]), Vec::<String>::new());
    assert_eq!(open(line, &[("/old", "no")], &[]), Vec::<String>::new());
    assert_eq!(open(line, &[], &["netdev.script"]), Vec::<String>::new());
    assert_eq!(open(line, &[], &["netdev.script=/else"]), ["netdev.script=/old"]);
    assert_eq!(open("-serial unix:/a", &[("/a", "/b")], &[]), Vec::<String>::new());
    assert_eq!(open("-serial unix:/a", &[("unix:/a", "unix:/b")], &[]), Vec::<String>::new());
    let unused = mapped(line, &[("nothing", "x")]).unused;
    assert_eq!(unused, ["nothing"]);
    let (_, unused) =
        mapped(line, &[]).check(&CARRIED, &["plugin".to_owned(), "netdev.script".to_owned()]);
    assert_eq!(unused, ["plugin"]);
}

/// Nothing that a restored VM has is open to another user.
#[test]
fn user_of_the_process_cannot_be_handed_over() {
    for (line, place) in [
        ("-runas nobody", "runas"),
        ("-run-with user=nobody", "run-with.user"),
        ("-run-with user=1:2", "run-with.user"),
    ] {
        let value = line.rsplit([' ', '=']).next().unwrap();
        let here = [format!("{place}={value}")];
        assert_eq!(open(line, &[], &[]), here);
        assert_eq!(open(line, &[], &[place]), here);
        assert_eq!(open(line, &[], &[here[0].as_str()]), here);
        assert_eq!(open(line, &[(value, "root")], &[]), [format!("{place}=root")]);
        assert!(check(&options(line), &CARRIED).iter().all(Finding::is_fatal));
        assert_eq!(
            mapped(line, &[]).check(&CARRIED, &[place.to_owned()]).1,
            Vec::<String>::new(),
            "it is not unused"
        );
    }
}

#[test]
fn whole_values_of_any_kind_may_be_mapped() {
    let line = "-vnc :0 -netdev user,id=n,hostfwd=tcp::1-:22 -serial file:log -chardev socket,id=c,path=/p,server=on";
    let mapped = mapped(
        line,
        &[(":0", ":7"), ("tcp::1-:22", "tcp::2-:22"), ("log", "/l,og"), ("/p", "/q"), ("n", "m")],
    );
    let new = "-vnc :7 -netdev user,id=m,hostfwd=tcp::2-:22 -serial file:/l,og -chardev socket,id=c,path=/q,server=on";
    assert_eq!(words(&mapped.options).join(" "), new);
    assert!(mapped.unused.is_empty());
}

#[test]
fn what_qemu_makes_comes_into_its_own_directory() {
    let line = "-qmp unix:/run/a/q.sock,server=on -chardev socket,id=c,path=/run/b/q.sock,server=on -serial file:log -D /x/log -pidfile /keep/p";
    let mut mapped = mapped(line, &[("/keep/p", "/mine/p")]);
    let moved = mapped.relocate(&[]);
    let new = "-qmp unix:q.sock,server=on -chardev socket,id=c,path=q.sock.2,server=on -serial file:log -D log.2 -pidfile /mine/p";
    assert_eq!(words(&mapped.options).join(" "), new);
    assert_eq!(moved[0], ("/run/a/q.sock".to_owned(), "q.sock".to_owned()));
    assert_eq!(free_name("/..", &HashSet::new()), "file");
}

#[test]
fn only_what_no_restore_can_bring_is_fatal() {
    let fatal = |line: &str| check(&options(line), &CARRIED).iter().any(Finding::is_fatal);
    assert!(fatal("-drive file=spare.img") && fatal("-kernel other") && fatal("-device x,new=/y"));
    assert!(
        !fatal("-netdev tap,id=n,script=/x")
            && !fatal("-fsdev local,id=f,path=/x")
            && !fatal("-serial file:/x")
    );
}
