use super::*;
use crate::parse;
use crate::restorable::{self, Carried};

/// The commands that read a command line by this module.
const LINE: [Command; 3] = [Command::Run, Command::Attach, Command::Adopt];

fn options(line: &str) -> Vec<QemuOption> {
    parse(&line.split(' ').map(str::to_owned).collect::<Vec<_>>()).unwrap()
}

fn refused(line: &str, command: Command) -> Option<&'static Row> {
    on_line(&options(line), command).map(|refusal| refusal.row)
}

/// By each command that its set names, and as itself; by no other command.
#[test]
fn unsupported_row_is_refused_by_each_command_of_its_set() {
    for row in ROWS {
        for line in examples(row) {
            for command in LINE {
                let found = refused(&line, command);
                if row.is_refused_by(command) {
                    assert_eq!(found, Some(row), "{line}: {command:?}");
                    let said = on_line(&options(&line), command).unwrap().to_string();
                    assert!(said.contains(row.remedy()), "{line}: {command:?}: {said}");
                } else {
                    assert!(found != Some(row), "{line}: {command:?}");
                }
            }
        }
    }
}

#[test]
fn unsupported_device_is_refused_in_a_running_vm() {
    for row in ROWS.iter().filter(|row| row.is_refused_by(Command::Checkpoint)) {
        for what in row.what() {
            let found = match *what {
                What::Devices(models) => models.iter().all(|model| {
                    device(&model.replace('*', "-x"), "it").is_some_and(|found| found.row == row)
                }),
                What::Property(model, key, value) => {
                    properties(&model.replace('*', "-pci")).any(|found| found == (key, value, row))
                }
                What::Several(model) => several().any(|found| found == (model, row)),
                _ => false,
            };
            assert!(found, "{what:?} is not looked for in a running VM");
        }
    }
}

#[test]
fn unsupported_row_of_a_restore_is_a_finding_of_it() {
    let no = |_: &str| false;
    let carried = Carried { is_disk: &no, is_boot_file: &no, is_qemus_own: &no };
    for row in ROWS.iter().filter(|row| row.is_refused_by(Command::Restore)) {
        for line in examples(row) {
            assert!(!restorable::check(&options(&line), &carried).is_empty(), "{line}");
        }
    }
}

#[test]
fn unsupported_models_are_found_by_name_or_family() {
    for model in [
        "isa-vga",
        "isa-cirrus-vga",
        "ati-vga",
        "cxl-rp",
        "cxl-type3",
        "edu",
        "isa-applesmc",
        "pxb",
        "pxb-pcie",
        "uefi-vars-x64",
        "vhost-user-fs-pci",
        "vfio-pci",
        "ivshmem-plain",
        "vhost-vsock-pci",
        "nvdimm",
        "scsi-block",
        "pci-serial-2x",
        "vmbus-bridge",
        "nvme",
    ] {
        assert!(device(model, "it").is_some(), "{model}");
    }
    for model in [
        "VGA",
        "cirrus-vga",
        "educational",
        "pcie-pci-bridge",
        "virtio-vga",
        "isa-vga2",
        "virtio-blk-pci",
        "virtio-net-pci",
        "e1000e",
        "virtio-rng-pci",
        "virtio-balloon-pci",
        "virtio-9p-pci",
        "usb-host",
    ] {
        assert_eq!(device(model, "it"), None, "{model}");
    }
}

#[test]
fn unsupported_properties_are_asked_of_their_models_alone() {
    let keys = |model: &str| properties(model).map(|(key, ..)| key).collect::<Vec<_>>();
    assert_eq!(keys("virtio-balloon-pci-transitional"), ["free-page-hint"]);
    assert_eq!(keys("ramfb"), ["x-migrate"]);
    assert!(keys("virtio-net-pci").is_empty());
    let (_, value, _) = properties("ramfb").next().unwrap();
    assert!(value.has(None) && !value.has(Some("on")), "no such property: QEMU before 8.2");
}

#[test]
fn refusal_names_the_command_that_can_have_it() {
    let said = |line: &str, command| on_line(&options(line), command).unwrap().to_string();
    let memory = "-object memory-backend-ram,id=m,size=1G";
    assert!(said(memory, Command::Run).contains("cannot be used with 'stillpoint run': "));
    assert!(said(memory, Command::Adopt).ends_with(", or checkpoint it by stream as it is"));
    let nvme = "-device nvme,serial=1";
    assert!(said(nvme, Command::Run).starts_with("-device nvme cannot be checkpointed: "));
    assert_eq!(said(nvme, Command::Run), said(nvme, Command::Adopt));
}
