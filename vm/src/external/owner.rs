//! Who used the tracker of a QEMU last.
//!
//! The kernel's marks of written pages are one set for one QEMU. A VM that is attached under
//! another name, or from another runtime directory, claims and acknowledges them for itself, and
//! the first one would continue as if they were its own. So each leaves a sign in QEMU (an object
//! that does nothing) with a number above all that are there, and believes its `marks.json` only if
//! its own number is still the highest. Signs of others stay where they are.

use crate::runtime_dir::{RuntimeDir, VmFile};
use anyhow::{Context, Result};
use qmp_bridge::Qmp;
use serde_json::json;

const PREFIX: &str = "sp-at-";
const DIGEST_LETTERS: usize = 16;
/// Signs of releases before had no number, so which of them was the last to claim is unknown.
const UNNUMBERED: &str = "stillpoint-at-";

/// To be called before a tracker is used.
pub(crate) async fn claim(qmp: &Qmp, runtime: &RuntimeDir, file: &VmFile) -> Result<()> {
    let objects = qmp.qom_list("/objects").await.context("asking QEMU for its objects")?;
    let names: Vec<&str> = objects.iter().map(|object| object.name.as_str()).collect();
    let own = digest(runtime, file);
    let signs: Vec<Sign> = names.iter().filter_map(|name| Sign::parse(name)).collect();
    if is_last(&signs, &own) && !names.iter().any(|name| is_unnumbered(name)) {
        return Ok(());
    }
    runtime.forget_exact_marks()?;
    let number = signs.iter().map(|sign| sign.number).max().unwrap_or(0).saturating_add(1);
    let sign = Sign { digest: own, number };
    let object = json!({ "qom-type": "throttle-group", "id": sign.id() });
    let placed = qmp.execute_json("object-add", object).await;
    if !placed.as_ref().is_err_and(|_| signs.contains(&sign)) {
        placed.context("leaving a sign in QEMU")?;
    }
    for old in signs.iter().filter(|old| old.digest == sign.digest && old.number != sign.number) {
        qmp.execute_json("object-del", json!({ "id": old.id() }))
            .await
            .context("replacing an earlier sign of ours in QEMU")?;
    }
    Ok(())
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Sign {
    digest: String,
    number: u32,
}

impl Sign {
    fn id(&self) -> String {
        format!("{PREFIX}{}-{}", self.digest, self.number)
    }

    fn parse(name: &str) -> Option<Self> {
        let (digest, number) = name.strip_prefix(PREFIX)?.split_once('-')?;
        let sign = Self { digest: digest.to_owned(), number: number.parse().ok()? };
        (is_digest(digest) && sign.id() == name).then_some(sign)
    }
}

fn is_digest(text: &str) -> bool {
    text.len() == DIGEST_LETTERS && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

fn is_unnumbered(name: &str) -> bool {
    name.strip_prefix(UNNUMBERED).is_some_and(is_digest)
}

fn is_last(signs: &[Sign], own: &str) -> bool {
    let newest = signs.iter().max_by_key(|sign| sign.number);
    let alone =
        |newest: &Sign| signs.iter().filter(|sign| sign.number == newest.number).count() == 1;
    newest.is_some_and(|newest| newest.digest == own && alone(newest))
}

fn digest(runtime: &RuntimeDir, file: &VmFile) -> String {
    let digest =
        blake3::hash(format!("{}\n{}", runtime.path().display(), file.instance).as_bytes())
            .to_hex();
    digest[..DIGEST_LETTERS].to_owned()
}

#[cfg(test)]
mod test {
    use super::*;

    const A: &str = "00000000000000aa";
    const B: &str = "00000000000000bb";

    fn sign(digest: &str, number: u32) -> Sign {
        Sign { digest: digest.to_owned(), number }
    }

    #[test]
    fn tracker_sign_counts_only_as_the_newest() {
        assert!(is_last(&[sign(A, 1)], A) && is_last(&[sign(B, 1), sign(A, 2)], A));
        assert!(
            !is_last(&[], A)
                && !is_last(&[sign(A, 1), sign(B, 2)], A)
                && !is_last(&[sign(A, 2), sign(B, 2)], A)
        );
    }

    #[test]
    fn tracker_sign_is_read_as_written_and_objects_of_others_are_none() {
        assert_eq!(Sign::parse(&sign(A, 7).id()), Some(sign(A, 7)));
        for other in [
            "sp-at-home",
            "sp-at-home-1",
            "sp-at-00000000000000aa-07",
            "sp-at-00000000000000aa-x",
            "stillpoint-at-home",
        ] {
            assert!(Sign::parse(other).is_none() && !is_unnumbered(other), "{other}");
        }
        assert!(is_unnumbered("stillpoint-at-00000000000000aa"));
    }
}
