//! What a command line says of the first start alone: a restored VM begins elsewhere, in another
//! way.

use super::arguments::{self, QemuOption};

/// How the process begins, and who debugs it.
const FIRST: &[&str] = &["S", "daemonize", "gdb", "loadvm", "s"];

/// The options that every start has, and the words that only the first has.
pub fn split(options: Vec<QemuOption>) -> (Vec<QemuOption>, Vec<String>) {
    let (first, saved): (Vec<_>, Vec<_>) =
        options.into_iter().partition(|option| FIRST.contains(&option.name.as_str()));
    (saved, arguments::words(&first))
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn only_the_first_start_loads_a_snapshot_or_waits() {
        let words: Vec<String> =
            "-m 1G -loadvm old -S -s -pidfile p".split(' ').map(str::to_owned).collect();
        let (saved, first) = split(arguments::parse(&words).unwrap());
        assert_eq!(arguments::words(&saved).join(" "), "-m 1G -pidfile p");
        assert_eq!(first.join(" "), "-loadvm old -S -s");
    }
}
