//! Waiting for a moment, more closely than a runtime's timers do, which count milliseconds; and what a
//! thread has cost.

#[cfg(target_os = "linux")]
mod kernel {
    use std::{io, os::fd::OwnedFd, time::Duration};

    use rustix::time::{
        ClockId, Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec,
        clock_gettime, timerfd_create, timerfd_settime,
    };
    use tokio::io::{Interest, unix::AsyncFd};

    use super::super::lane;

    /// A timer is set to so much at most.
    const LONGEST_NS: u64 = 3_600_000_000_000;

    #[expect(deprecated, reason = "its successor is unsafe; an owned descriptor stays what it is")]
    fn register(timer: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
        AsyncFd::with_interest(timer, Interest::READABLE)
    }

    /// One timer of the kernel's.
    #[derive(Debug)]
    pub(in super::super) struct Alarm {
        timer: AsyncFd<OwnedFd>,
        /// When it fires; `None` = it is not set.
        at: Option<u64>,
    }

    impl Alarm {
        pub(in super::super) fn new() -> io::Result<Self> {
            let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
            let timer = timerfd_create(TimerfdClockId::Monotonic, flags)?;
            Ok(Self { timer: register(timer)?, at: None })
        }

        /// Waits until `at`, or less long; nanoseconds of a clock that says `now`. A time that is set
        /// already and earlier is left as it is: whoever wakes early looks again.
        ///
        /// # Errors
        ///
        /// If the system's timer fails.
        pub(in super::super) async fn until(&mut self, at: u64, now: u64) -> io::Result<()> {
            if self.at.is_none_or(|set| set > at || set <= now) {
                // Zero would mean never.
                let time = Duration::from_nanos(at.saturating_sub(now).clamp(1, LONGEST_NS));
                let zero = Timespec { tv_sec: 0, tv_nsec: 0 };
                let value = Timespec {
                    tv_sec: i64::try_from(time.as_secs()).unwrap_or(i64::MAX),
                    tv_nsec: time.subsec_nanos().into(),
                };
                let set = Itimerspec { it_interval: zero, it_value: value };
                timerfd_settime(self.timer.get_ref(), TimerfdTimerFlags::empty(), &set)?;
                self.at = Some(now.saturating_add(lane::ns(time)));
            }
            loop {
                let mut ready = self.timer.readable().await?;
                let mut fired = [0; 8];
                let read = ready.try_io(|timer| Ok(rustix::io::read(timer.get_ref(), &mut fired)?));
                // It would block: of a time before.
                if let Ok(outcome) = read {
                    self.at = None;
                    return outcome.map(drop);
                }
            }
        }
    }

    /// CPU time of the calling thread.
    pub(in super::super) fn thread_cpu() -> Duration {
        let time = clock_gettime(ClockId::ThreadCPUTime);
        Duration::new(
            u64::try_from(time.tv_sec).unwrap_or_default(),
            u32::try_from(time.tv_nsec).unwrap_or_default(),
        )
    }
}

#[cfg(not(target_os = "linux"))]
mod kernel {
    use std::{io, time::Duration};

    /// The runtime's timer, to the millisecond.
    #[derive(Debug)]
    pub(in super::super) struct Alarm;

    impl Alarm {
        pub(in super::super) fn new() -> io::Result<Self> {
            Ok(Self)
        }

        pub(in super::super) async fn until(&mut self, at: u64, now: u64) -> io::Result<()> {
            tokio::time::sleep(Duration::from_nanos(at.saturating_sub(now))).await;
            Ok(())
        }
    }

    /// Not known here.
    pub(in super::super) fn thread_cpu() -> Duration {
        Duration::ZERO
    }
}

pub(super) use kernel::{Alarm, thread_cpu};
