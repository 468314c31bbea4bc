//! Waiting for what no event announces.

use std::time::Duration;

use tokio::time::{Instant, sleep};

/// Calls `probe` every `interval` until it gives an answer, and for `timeout` at most. `None`: it
/// never did. A probe that does not wait is `|| ready(…)`. It is called once at least, and
/// once more after `timeout` has passed.
pub async fn poll_until<T, F: Future<Output = Option<T>>>(
    timeout: Duration,
    interval: Duration,
    mut probe: impl FnMut() -> F,
) -> Option<T> {
    let deadline = Instant::now() + timeout;
    loop {
        let is_last = Instant::now() >= deadline;
        let answer = probe().await;
        if answer.is_some() || is_last {
            return answer;
        }
        sleep(interval).await;
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use std::future::ready;

    const INTERVAL: Duration = Duration::from_secs(1);

    #[tokio::test(start_paused = true)]
    async fn poll_ends_with_an_answer_or_with_its_time() {
        let mut asked = 0;
        let third = || {
            asked += 1;
            ready((asked == 3).then_some(asked))
        };
        assert_eq!(poll_until(INTERVAL * 60, INTERVAL, third).await, Some(3));
        let begun = Instant::now();
        let mut asked = 0;
        let never = || {
            asked += 1;
            ready(None::<()>)
        };
        assert_eq!(poll_until(INTERVAL * 5 / 2, INTERVAL, never).await, None);
        assert_eq!((asked, begun.elapsed()), (4, INTERVAL * 3));
        assert_eq!(poll_until(Duration::ZERO, INTERVAL, || ready(Some(1))).await, Some(1));
    }
}
