//! What cannot be checkpointed is refused before anything is done, with the reason and what to do
//! instead: the rows of `qemu_cmdline::table::unsupported`, and what the tables do not know.

use super::arguments::QemuOption;
use super::form::Form;
use anyhow::{Result, bail};
use qemu_cmdline::unsupported::{self, Command};
use qemu_cmdline::{Use, table, visit};
use std::path::Path;

/// `directory` is QEMU's working directory; `command` is `Run` or `Attach`.
///
/// # Errors
/// Refused at the first option that no checkpoint can have, with the reason and what to do.
pub fn check(options: &[QemuOption], command: Command, directory: &Path) -> Result<()> {
    check_known(options, directory)?;
    match unsupported::on_line(options, command) {
        Some(refusal) => bail!("{refusal}"),
        None => Ok(()),
    }
}

/// What the table does not know and could be a file is not guessed at.
fn check_known(options: &[QemuOption], directory: &Path) -> Result<()> {
    if let Some(option) = options.iter().find(|option| table::syntax(&option.name).is_none()) {
        bail!(
            "QEMU option -{} is not in Stillpoint's table of options (QEMU 7.2 to 11.1): its meaning is unknown; leave it out",
            option.name
        );
    }
    let braces = options.iter().find(|option| {
        option.value().starts_with('{') && matches!(Form::of(option), Form::List { .. })
    });
    if let Some(option) =
        braces.filter(|option| matches!(table::syntax(&option.name), Some(table::Syntax::Keys(..))))
    {
        bail!(
            "-{} {} begins as JSON and is none; write it with double quotes, or as a list",
            option.name,
            option.value()
        );
    }
    let mut unknown = None;
    visit(options, |site| {
        let is_file = || !is_word(site.value) && directory.join(site.value).is_file();
        if site.means == Use::Unknown && (site.value.contains('/') || is_file()) {
            unknown.get_or_insert_with(|| format!("-{} {}={}", site.option, site.key, site.value));
        }
    });
    match unknown {
        None => Ok(()),
        Some(what) => bail!(
            "{what} could be a file, and Stillpoint's table of options does not know it; leave it out"
        ),
    }
}

/// QEMU's own words, after which a file may be called too.
fn is_word(text: &str) -> bool {
    const WORDS: &[&str] =
        &["on", "off", "yes", "no", "true", "false", "auto", "none", "default", "raw", "qcow2", ""];
    WORDS.contains(&text) || text.bytes().all(|byte| byte.is_ascii_digit())
}

#[cfg(test)]
mod test {
    use super::super::arguments::parse;
    use super::*;

    fn refused(line: &str) -> String {
        let words: Vec<String> = line.split(' ').map(str::to_owned).collect();
        check(&parse(&words).unwrap(), Command::Run, Path::new("/vm")).unwrap_err().to_string()
    }

    #[test]
    fn every_refusal_names_the_option_and_a_remedy() {
        let lines = [
            "-device vhost-user-blk-pci,chardev=c",
            "-device vfio-pci,host=01:00.0",
            "-device virtio-balloon-pci,free-page-hint=on",
            "-object memory-backend-ram,id=m,size=1G",
            "-machine q35,memory-backend=m",
            "-numa node,memdev=m",
            "-mem-path /dev/hugepages",
            "-incoming defer",
            "-runas nobody",
            "-run-with async-teardown=on,user=nobody",
            "-snapshot",
            "-netdev vhost-user,id=n,chardev=c",
            "-drive file=a,snapshot=on",
            "-device nvme,drive=d",
            "-global migration.send-configuration=off",
            "-netdev tap,id=n,fd=3",
            "-add-fd fd=3,set=1",
            "-device something,newfile=/x",
            "-newoption x",
            "-device {'driver':'e1000'}",
        ];
        for line in lines {
            let text = refused(line);
            let named = line.split([' ', ',', '=']).filter(|word| word.len() > 3);
            assert!(named.clone().any(|word| text.contains(word)), "{line}: {text}");
            assert!(text.contains(';'), "{line}: no remedy in '{text}'");
        }
    }

    #[test]
    fn an_ordinary_vm_passes() {
        let line = "-m 1G -smp 4 -machine q35 -drive file=a.qcow2,if=virtio -netdev tap,id=n,vhost=on -device virtio-net-pci,netdev=n";
        let words: Vec<String> = line.split(' ').map(str::to_owned).collect();
        check(&parse(&words).unwrap(), Command::Run, Path::new("/vm")).unwrap();
    }

    fn judged(line: &str, command: Command) -> bool {
        let words: Vec<String> = line.split(' ').map(str::to_owned).collect();
        check(&parse(&words).unwrap(), command, Path::new("/vm")).is_ok()
    }

    #[test]
    fn a_balloon_is_no_reason_to_refuse() {
        let json = r#"-device {"driver":"virtio-balloon-pci","id":"balloon0"}"#;
        let net = "-device virtio-net-pci,failover=off -global virtio-net-pci.failover=off";
        let hint = "-global virtio-balloon-pci.free-page-hint=off";
        for line in [
            "-device virtio-balloon-pci",
            "-device virtio-balloon-pci,free-page-reporting=on",
            json,
            net,
            hint,
        ] {
            assert!(judged(line, Command::Attach) && judged(line, Command::Run), "{line}");
        }
    }

    #[test]
    fn an_attached_vm_may_have_memory_of_its_own() {
        for line in [
            "-object memory-backend-ram,id=m,size=1G",
            "-machine q35,memory-backend=m",
            "-numa node,memdev=m",
            "-mem-path /x",
            "-incoming defer",
            "-runas nobody",
            "-run-with user=nobody",
        ] {
            assert!(judged(line, Command::Attach) && !judged(line, Command::Run), "{line}");
        }
    }

    #[test]
    fn what_no_engine_can_save_is_refused_in_every_form() {
        for line in [
            r#"-device {"driver":"vfio-pci","host":"0000:01:00.0"}"#,
            r#"-netdev {"type":"vhost-user","id":"n"}"#,
            "-device vhost-user-fs-pci,chardev=c",
            "-device vhost-vdpa-device-pci,vhostdev=/dev/x",
            "-device ivshmem-doorbell,chardev=c",
            "-device scsi-generic,drive=d",
            "-object tdx-guest,id=t",
            "-netdev vhost-vdpa,id=n",
            "-device virtio-balloon-pci,free-page-hint=on",
            r#"-device {"driver":"virtio-balloon-pci","free-page-hint":true}"#,
            "-device scsi-block,drive=d",
            "-device loader,addr=0x8000,data=1,data-len=4",
            r#"-object {"qom-type":"sev-guest","id":"s"}"#,
            "-machine q35,confidential-guest-support=s",
            "-drive file=a,snapshot=on",
            "-device pc-dimm,memdev=m",
            "-global driver=migration,property=multifd,value=on",
            "-global migration.store-global-state=off",
            "-global virtio-balloon-device.free-page-hint=on",
            "-global driver=virtio-balloon-pci,property=free-page-hint,value=yes",
            "-global loader.data=1",
            "-device usb-mtp",
            "-device virtio-net-pci,id=s,failover=on",
            r#"-device {"driver":"virtio-net-pci","failover":true}"#,
            "-device e1000e,id=p,failover_pair_id=s",
            "-global virtio-net-pci.failover=on",
            "-global driver=virtio-net-device,property=failover,value=on",
            "-device amd-iommu",
            "-device virtio-crypto-pci,cryptodev=c",
            "-device isa-vga",
            r#"-device {"driver":"isa-cirrus-vga"}"#,
            "-device ati-vga",
            "-device cxl-rp,id=r",
            "-audio none,model=adlib",
            "-audio driver=none,model=virtio",
            "-usbdevice braille",
            "-icount shift=1,rr=record,rrfile=x",
        ] {
            assert!(!judged(line, Command::Attach), "{line}");
        }
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
            assert!(!judged(line, Command::Attach) && !judged(line, Command::Run), "{line}");
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
            assert!(judged(line, Command::Attach) && judged(line, Command::Run), "{line}");
        }
    }
}
