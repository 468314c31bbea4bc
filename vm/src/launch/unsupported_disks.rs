//! Disks that would not come back as they are, found on the command line: before anything runs, and
//! in whatever form they are written. What a running QEMU's block graph shows is judged by
//! `qmp_bridge::disks`.

use super::arguments::QemuOption;
use super::form::{Form, is_on};
use anyhow::{Result, bail};
use qemu_cmdline::{Use, table, visit};

const OVERLAY: &str = "make an overlay: qemu-img create -f qcow2 -b BASE -F qcow2 OVERLAY";
const CONVERT: &str = "convert it by qemu-img into a qcow2 or raw image";

pub(super) fn check(options: &[QemuOption]) -> Result<()> {
    options
        .iter()
        .filter(|option| ["drive", "blockdev"].contains(&option.name.as_str()))
        .try_for_each(check_tree)?;
    let mut protocol = None;
    visit(options, |site| {
        let is_name = site.means == Use::Disk && (site.key == "file" || site.key.is_empty());
        if let Some(name) = protocol_of(site.value).filter(|name| is_name && *name != "host_device")
        {
            protocol.get_or_insert_with(|| {
                (site.option.to_owned(), name.to_owned(), site.value.to_owned())
            });
        }
    });
    match protocol {
        None => Ok(()),
        Some((option, name, value)) => {
            bail!("-{option} {value}: a checkpoint holds no disk of protocol {name}; {CONVERT}")
        }
    }
}

fn check_tree(option: &QemuOption) -> Result<()> {
    for (key, value) in Form::of(option).deep_scalars() {
        let name = &option.name;
        let last = key.rsplit('.').next().unwrap_or(&key);
        match last {
            "snapshot" if is_on(&value) => {
                bail!("-{name} {key}=on writes to a disk that vanishes with QEMU; {OVERLAY}")
            }
            "driver" | "format" if !table::BLOCK_DRIVERS.contains(&value.as_str()) => {
                bail!("-{name} {key}={value}: a checkpoint holds no disk of that kind; {CONVERT}")
            }
            "offset" | "size" if value != "0" => {
                bail!(
                    "-{name} {key}={value} shows a part of a file as the disk; copy that part into an image of its own"
                )
            }
            _ if key.split('.').any(|part| part == "data-file") => {
                bail!("-{name} {key}={value}: the image keeps its data in another file; {CONVERT}")
            }
            _ => {}
        }
    }
    Ok(())
}

/// As QEMU finds it: what stands before a colon, if no slash comes first. `file:` is none.
fn protocol_of(path: &str) -> Option<&str> {
    let (name, _) = path.split_at(path.find([':', '/'])?);
    path[name.len()..].starts_with(':').then_some(name)
}

#[cfg(test)]
mod test {
    use super::*;
    use qemu_cmdline::parse;

    fn options(line: &str) -> Vec<QemuOption> {
        parse(&line.split(' ').map(str::to_owned).collect::<Vec<_>>()).unwrap()
    }

    #[test]
    fn disks_that_would_be_others_are_refused_in_every_form() {
        for line in [
            "-drive file=a,snapshot=on",
            "-drive file=a,snapshot",
            "-drive snapshot,file=a",
            r#"-drive file=json:{"driver":"raw",,"offset":512,,"file":{"driver":"file",,"filename":"a"}}"#,
            "-drive file=a,format=raw,offset=1048576",
            "-blockdev driver=raw,node-name=d,size=4096,file.driver=file,file.filename=a",
            r#"-blockdev {"driver":"raw","node-name":"d","offset":512,"file":"f"}"#,
            "-blockdev driver=qcow2,node-name=d,file=f,data-file.driver=file,data-file.filename=x",
            "-blockdev driver=qcow2,node-name=d,file=f,data-file=x",
            r#"-blockdev {"driver":"qcow2","node-name":"d","file":"f","data-file":{"driver":"file","filename":"x"}}"#,
            "-blockdev driver=quorum,node-name=q,children.0=a,children.1=b",
            "-blockdev blkdebug,node-name=b,image=a",
            "-blockdev driver=raw,node-name=b,file.driver=nbd,file.server.type=unix,file.server.path=/x",
            "-blockdev null-co,node-name=n,size=1G",
            "-blockdev snapshot-access,node-name=n,file=f",
            "-drive driver=null-co,size=1G",
            "-drive file=a.vmdk,format=vmdk",
            "-drive file=nbd:host:1",
            "-drive file=nbd+unix:///x?socket=/y",
            "-hda http://host/x.img",
            "-cdrom fat:rw:dir",
            "-drive file=blkdebug::a",
        ] {
            assert!(check(&options(line)).is_err(), "{line}");
        }
    }

    #[test]
    fn ordinary_disks_pass() {
        for line in [
            "-drive file=/a:b.img,format=raw,snapshot=off -hda ./c:d.img -drive file=file:x,if=virtio,cache=none,bps-size=1 -drive if=none,id=cd",
            r#"-blockdev {"driver":"qcow2","node-name":"d","backing":null,"file":{"driver":"file","filename":"a"}}"#,
            "-blockdev driver=raw,offset=0,node-name=d,file.driver=host_device,file.filename=/dev/vg/lv -cdrom x.iso",
            "-drive file=host_device:/dev/vg/lv,format=raw -blockdev driver=file,filename=spare,node-name=unused",
            "-drive file=snapshot,id=offset,format=raw",
        ] {
            check(&options(line)).unwrap();
        }
    }
}
