//! The port between the registers, the console's output and the interrupt line.

use std::convert::Infallible;
use std::io;
use std::sync::{Arc, PoisonError};

use ferry_proto::state::v1 as saved;
use vm_superio::serial::NoEvents;
use vm_superio::{Serial, SerialState, Trigger};

use super::super::{DeviceStateError, InterruptLine, SharedOutput};
use super::state;

/// A 16550 whose transmitter is always ready.
pub(crate) struct SerialPort {
    registers: Serial<Line, NoEvents, Output>,
}

impl SerialPort {
    /// A port as after power-on.
    pub(crate) fn new(output: SharedOutput, line: Arc<dyn InterruptLine>) -> Self {
        Self::build(&SerialState::default(), output, line).expect("the default state has no input")
    }

    /// A port with saved registers; may raise its interrupt.
    pub(crate) fn restore(
        saved: &saved::Serial,
        output: SharedOutput,
        line: Arc<dyn InterruptLine>,
    ) -> Result<Self, DeviceStateError> {
        Self::build(&state::from_saved(saved)?, output, line)
    }

    /// The registers and the input that the guest has not read.
    pub(crate) fn save(&self) -> saved::Serial {
        state::to_saved(&self.registers.state())
    }

    /// Reads a register.
    pub(crate) fn read(&mut self, offset: u8) -> u8 {
        self.registers.read(offset)
    }

    /// Writes a register. Neither line nor output can fail, so there is nothing to report.
    pub(crate) fn write(&mut self, offset: u8, value: u8) {
        let _ = self.registers.write(offset, value);
    }

    /// Receives bytes from outside, as many as there is room for.
    pub(crate) fn push_input(&mut self, bytes: &[u8]) -> usize {
        let room = self.registers.fifo_capacity().min(bytes.len());
        if room == 0 {
            return 0;
        }
        self.registers.enqueue_raw_bytes(&bytes[..room]).unwrap_or(0)
    }

    fn build(
        state: &SerialState,
        output: SharedOutput,
        line: Arc<dyn InterruptLine>,
    ) -> Result<Self, DeviceStateError> {
        let received = state.in_buffer.len() as u64;
        let registers = Serial::from_state(state, Line(line), NoEvents, Output(output))
            .map_err(|_| DeviceStateError::above("number of received bytes", received, state::RECEIVE_LIMIT as u64))?;
        Ok(Self { registers })
    }
}

struct Line(Arc<dyn InterruptLine>);

impl Trigger for Line {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        self.0.pulse();
        Ok(())
    }
}

struct Output(SharedOutput);

impl io::Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut output = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        output.write(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::super::super::ConsoleOutput;
    use super::*;

    #[derive(Clone, Default)]
    struct Recorder(Arc<Mutex<Vec<u8>>>);

    impl ConsoleOutput for Recorder {
        fn write(&mut self, bytes: &[u8]) {
            self.0.lock().expect("not poisoned").extend_from_slice(bytes);
        }
    }

    #[derive(Default)]
    struct Counter(AtomicUsize);

    impl InterruptLine for Counter {
        fn raise(&self) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }

        fn lower(&self) {}
    }

    fn port() -> (SerialPort, Recorder, Arc<Counter>) {
        let (recorder, counter) = (Recorder::default(), Arc::new(Counter::default()));
        let output: SharedOutput = Arc::new(Mutex::new(Box::new(recorder.clone())));
        (SerialPort::new(output, counter.clone()), recorder, counter)
    }

    #[test]
    fn transmitted_bytes_reach_the_output() {
        let (mut port, recorder, _) = port();
        for byte in b"hi\n" {
            port.write(0, *byte);
        }
        assert_eq!(*recorder.0.lock().expect("not poisoned"), b"hi\n");
    }

    #[test]
    fn input_raises_the_interrupt_once_and_is_read_back() {
        let (mut port, _, counter) = port();
        port.write(1, 1);
        assert_eq!(port.push_input(b"xy"), 2);
        assert_eq!(counter.0.load(Ordering::Relaxed), 1);
        assert_eq!([port.read(0), port.read(0)], *b"xy");
    }

    #[test]
    fn full_port_takes_no_more() {
        let (mut port, _, _) = port();
        assert_eq!(port.push_input(&[1; 100]), 64);
        assert_eq!(port.push_input(&[1; 100]), 0);
    }
}
