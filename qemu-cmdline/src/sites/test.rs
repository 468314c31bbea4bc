use super::*;
use crate::arguments::{parse, words};

fn options(line: &[&str]) -> Vec<QemuOption> {
    parse(&line.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>()).unwrap()
}

/// The values of one meaning, in order.
fn of(line: &[&str], means: Use) -> Vec<String> {
    let mut found = Vec::new();
    visit(&options(line), |site| {
        if site.means == means {
            found.push(site.value.to_owned());
        }
    });
    found
}

/// `d.img` becomes `/new` where it is a disk.
fn moved(line: &[&str]) -> String {
    let change = |site: &Site<'_>| {
        (site.means == Use::Disk && site.value == "d.img").then(|| "/new,1".to_owned())
    };
    words(&rewrite(options(line), change)).join(" ")
}

#[test]
fn disks_are_rewritten_in_every_spelling() {
    for (line, new) in [
        (&["-hdb", "d.img"][..], "-hdb /new,1"),
        (&["d.img"], "-hda /new,1"),
        (&["-drive", "file=d.img,if=none,id=d.img"], "-drive file=/new,,1,if=none,id=d.img"),
        (&["-drive", "file=file:d.img"], "-drive file=file:/new,,1"),
        (
            &["-drive", "driver=qcow2,file.driver=file,file.filename=d.img"],
            "-drive driver=qcow2,file.driver=file,file.filename=/new,,1",
        ),
        (
            &["-blockdev", "qcow2,node-name=d.img,file.filename=d.img"],
            "-blockdev qcow2,node-name=d.img,file.filename=/new,,1",
        ),
        (
            &[
                "-blockdev",
                r#"{"driver":"raw","node-name":"d.img","file":{"driver":"file","filename":"d.img"}}"#,
            ],
            r#"-blockdev {"driver":"raw","file":{"driver":"file","filename":"/new,1"},"node-name":"d.img"}"#,
        ),
        (
            &["-drive", r#"file=json:{"driver":"raw",,"file":{"filename":"d.img"}},id=d.img"#],
            r#"-drive file=json:{"driver":"raw",,"file":{"filename":"/new,,1"}},id=d.img"#,
        ),
        (
            &["-drive", "file=a,backing.file.filename=d.img"],
            "-drive file=a,backing.file.filename=/new,,1",
        ),
    ] {
        assert_eq!(moved(line), new);
    }
}

#[test]
fn a_value_that_only_looks_like_a_path_stays() {
    let line = &[
        "-drive",
        "media=d.img,id=d.img,format=d.img,node-name=d.img",
        "-device",
        "ide-hd,drive=d.img,id=d.img,serial=d.img",
        "-append",
        "d.img",
        "-name",
        "d.img",
        "-blockdev",
        "driver=raw,file=d.img,node-name=x",
        "-serial",
        "file:d.img",
        "-fw_cfg",
        "name=opt/x,string=d.img",
    ];
    assert_eq!(moved(line), words(&options(line)).join(" "));
}

#[test]
fn boot_files_are_found_wherever_they_stand() {
    let found = of(
        &[
            "-kernel",
            "k",
            "-initrd",
            "i",
            "-dtb",
            "t",
            "-fw_cfg",
            "opt/x,file=f",
            "-acpitable",
            "sig=X,file=a:b",
            "-acpitable",
            "data=c",
            "-smbios",
            "file=s",
            "-smbios",
            "type=11,path=p",
            "-machine",
            "q35,kernel=mk",
            "-device",
            "loader,file=l,addr=1",
            "-shim",
            "h",
            "-device",
            r#"{"driver":"ipmi-bmc-sim","sdrfile":"d"}"#,
        ],
        Use::Boot,
    );
    assert_eq!(found, ["k", "i", "t", "f", "a", "b", "c", "s", "p", "mk", "l", "h", "d"]);
    let firmware = of(
        &[
            "-bios",
            "b",
            "-option-rom",
            "o",
            "-device",
            "e1000,romfile=r",
            "-global",
            "e1000.romfile=g",
            "-device",
            "e1000,romfile=",
            "-boot",
            "splash=s",
        ],
        Use::Firmware,
    );
    assert_eq!(firmware, ["b", "o", "r", "g", "s"]);
    assert_eq!(of(&["-global", "driver=e1000,property=romfile,value=/g"], Use::Firmware), ["/g"]);
}

#[test]
fn sockets_and_logs_have_different_uses() {
    let line = &[
        "-qmp",
        "unix:q.sock,server,nowait",
        "-monitor",
        "unix:m.sock,server=on",
        "-serial",
        "mon:unix:c.sock",
        "-serial",
        "file:a,b.log",
        "-chardev",
        "socket,id=s,path=l.sock,server=on,wait=off",
        "-chardev",
        "socket,id=t,path=t.sock",
        "-chardev",
        "file,id=f,path=f.log,logfile=g.log",
        "-debugcon",
        "file:/d.log",
        "-parallel",
        "pipe:p",
        "-serial",
        "/dev/ttyS0",
        "-pidfile",
        "x.pid",
        "-D",
        "d.log",
        "-object",
        "filter-dump,id=x,netdev=n,file=n.pcap",
        "-vnc",
        "unix:v.sock,password=on",
        "-chardev",
        r#"{"id":"j","backend":{"type":"socket","data":{"addr":{"type":"unix","data":{"path":"j.sock"}}}}}"#,
        "-netdev",
        "stream,id=n,server=on,addr.type=unix,addr.path=st.sock",
        "-debugcon",
        "file:/dev/null",
        "-device",
        "usb-kbd,pcap=u.pcap",
    ];
    assert_eq!(
        of(line, Use::Listen),
        ["q.sock", "m.sock", "l.sock", "v.sock", "j.sock", "st.sock"]
    );
    assert_eq!(
        of(line, Use::Output),
        ["a,b.log", "f.log", "g.log", "/d.log", "x.pid", "d.log", "n.pcap", "u.pcap"]
    );
    assert_eq!(of(line, Use::Connect), ["c.sock", "t.sock", "p"]);
    assert_eq!(of(line, Use::HostDevice), ["/dev/ttyS0"]);
}

#[test]
fn who_commands_qemu_is_known() {
    let line = &[
        "-chardev",
        "socket,id=c,host=0.0.0.0,port=4444,server=on",
        "-mon",
        "chardev=c",
        "-chardev",
        "socket,id=d,host=h,port=1",
        "-serial",
        "tcp::1",
        "-monitor",
        "tcp::2",
        "-qmp",
        "tcp:127.0.0.1:3,server",
        "-gdb",
        "tcp::4",
        "-s",
    ];
    assert_eq!(
        of(line, Use::Control),
        ["0.0.0.0", "4444", "tcp::2", "tcp:127.0.0.1:3,server", "tcp::4", ""]
    );
    assert_eq!(
        of(
            &["-vnc", ":1", "-vnc", "127.0.0.1:2", "-vnc", "none", "-display", "vnc=0.0.0.0:3"],
            Use::Display
        ),
        [":1", "0.0.0.0:3"]
    );
}

#[test]
fn unknown_options_are_found() {
    assert_eq!(
        of(&["-future", "/x", "-device", "e1000,newfile=/y,mac=z"], Use::Unknown),
        ["/x", "/y"]
    );
    assert_eq!(
        of(&["-k", "de", "-object", "new-kind,path=/z"], Use::Unknown),
        ["de", "new-kind", "/z"]
    );
}

proptest::proptest! {
    #[test]
    fn what_is_parsed_is_written_again(parts in proptest::collection::vec("-{0,2}[a-z=,\"{}:./ -]{0,12}", 0..8)) {
        if let Ok(first) = parse(&parts) {
            let again = parse(&words(&first)).unwrap();
            proptest::prop_assert_eq!(&again, &first);
            // Nothing changes where nothing is asked for.
            proptest::prop_assert_eq!(&rewrite(first.clone(), |_| None), &first);
        }
    }

    #[test]
    fn a_list_is_written_as_qemu_reads_it(text in "[a-c=,.:]{0,16}") {
        let list = KeyList::parse(&text);
        proptest::prop_assert_eq!(KeyList::parse(&list.to_string()), list);
    }

    #[test]
    fn any_path_survives_its_quoting(path in "[^\u{0}]{1,24}", id in "[a-z]{1,4}") {
        let mut list = KeyList::default();
        list.push(Some("file"), path.clone());
        list.push(Some("id"), id.clone());
        let again = KeyList::parse(&list.to_string());
        proptest::prop_assert_eq!(again.get("file"), Some(path.as_str()));
        proptest::prop_assert_eq!(again.get("id"), Some(id.as_str()));
    }
}
