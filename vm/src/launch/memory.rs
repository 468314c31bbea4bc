//! The guest's RAM, taken out of a command line: a restored VM gets Stillpoint's own memory under
//! the same id.

use super::arguments::QemuOption;
use super::form::Form;
use super::host_specific::Dropped;
use anyhow::{Result, bail};

const KIND: &str = "memory-backend-";
const OURS: &str = "Stillpoint's memory takes its place under the same name";
const CONTENT: &str = "where the old process had its memory; the content is in the checkpoint";
const UNUSED: &str = "no memory of the guest";

/// A command line without memory of its own.
#[derive(Debug)]
pub(super) struct Freed {
    pub options: Vec<QemuOption>,
    /// The object that was the guest's RAM; none where it was the VM's default.
    pub block: Option<String>,
    pub dropped: Vec<Dropped>,
}

pub(super) fn take_out(options: Vec<QemuOption>) -> Result<Freed> {
    let block = block(&options)?;
    let mut freed = Freed { options: Vec::new(), block, dropped: Vec::new() };
    for option in options {
        let kept = freed.visit(option);
        freed.options.extend(kept);
    }
    Ok(freed)
}

impl Freed {
    fn visit(&mut self, option: QemuOption) -> Option<QemuOption> {
        match option.name.as_str() {
            "mem-path" | "mem-prealloc" => self.drop_it(&option, CONTENT),
            "object" if is_memory(&option) => {
                let is_ram = Form::of(&option).get("id") == self.block;
                self.drop_it(&option, if is_ram { OURS } else { UNUSED })
            }
            "machine" | "M" => {
                let mut form = Form::of(&option);
                form.remove("memory-backend");
                // QEMU takes an empty list for an error.
                (!form.is_empty()).then(|| form.into_option(&option.name))
            }
            _ => Some(option),
        }
    }

    fn drop_it(&mut self, option: &QemuOption, why: &'static str) -> Option<QemuOption> {
        self.dropped.push(Dropped {
            what: format!("-{} {}", option.name, option.value()).trim_end().to_owned(),
            why,
        });
        None
    }
}

fn is_memory(option: &QemuOption) -> bool {
    Form::of(option).get("qom-type").is_some_and(|kind| kind.starts_with(KIND))
}

/// The one object that is the guest's RAM.
fn block(options: &[QemuOption]) -> Result<Option<String>> {
    let vm = options.iter().filter(|option| ["machine", "M"].contains(&option.name.as_str()));
    let vm = vm.filter_map(|option| Form::of(option).get("memory-backend")).next_back();
    let mut nodes: Vec<String> = options
        .iter()
        .filter(|option| option.name == "numa")
        .filter_map(|option| Form::of(option).get("memdev"))
        .collect();
    nodes.dedup();
    if nodes.len() > 1 {
        bail!(
            "the guest's RAM is made of {} objects ({}), and a checkpoint knows one; give the VM one memory object, and NUMA nodes without \
             memory of their own",
            nodes.len(),
            nodes.join(", ")
        );
    }
    Ok(vm.or_else(|| nodes.pop()))
}

#[cfg(test)]
mod test {
    use super::super::arguments::{parse, words};
    use super::*;

    fn run(words: &[&str]) -> Result<Freed> {
        take_out(parse(&words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>())?)
    }

    fn line(freed: &Freed) -> String {
        words(&freed.options).join(" ")
    }

    #[test]
    fn the_object_goes_and_its_name_stays() {
        for object in [
            "memory-backend-ram,id=pc.ram,size=256M",
            r#"{"qom-type":"memory-backend-memfd","id":"pc.ram","share":true,"x-use-canonical-path-for-ramblock-id":false,"size":268435456}"#,
        ] {
            let freed = run(&[
                "-machine",
                "pc-q35-7.2,usb=off,memory-backend=pc.ram",
                "-m",
                "256",
                "-object",
                object,
            ])
            .unwrap();
            assert_eq!(line(&freed), "-machine pc-q35-7.2,usb=off -m 256");
            assert_eq!(freed.block.as_deref(), Some("pc.ram"));
            assert_eq!((freed.dropped.len(), freed.dropped[0].why), (1, OURS));
        }
    }

    #[test]
    fn default_memory_has_no_name_and_its_place_is_forgotten() {
        let freed = run(&["-m", "1G", "-mem-path", "/dev/hugepages", "-mem-prealloc", "-M", "q35"])
            .unwrap();
        assert_eq!((line(&freed).as_str(), freed.block), ("-m 1G -M q35", None));
        assert_eq!(freed.dropped.len(), 2);
    }

    #[test]
    fn one_numa_node_may_name_it_but_not_two() {
        let one = [
            "-object",
            "memory-backend-ram,id=ram-node0,size=1G",
            "-numa",
            "node,nodeid=0,cpus=0-1,memdev=ram-node0",
        ];
        let freed = run(&one).unwrap();
        assert_eq!(
            (line(&freed).as_str(), freed.block.as_deref()),
            ("-numa node,nodeid=0,cpus=0-1,memdev=ram-node0", Some("ram-node0"))
        );
        let error =
            run(&["-numa", "node,memdev=a", "-numa", "node,memdev=b"]).unwrap_err().to_string();
        assert!(error.contains("a, b") && error.contains("one memory object"), "{error}");
    }

    #[test]
    fn other_objects_stay() {
        let freed = run(&[
            "-object",
            "iothread,id=t",
            "-machine",
            "memory-backend=m",
            "-object",
            "memory-backend-file,id=m,size=1G,mem-path=/x",
        ]);
        assert_eq!(line(&freed.unwrap()), "-object iothread,id=t");
    }
}
