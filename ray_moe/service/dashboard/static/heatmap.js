// Layers x experts as one picture: a pixel for each expert, stretched in one draw, with a cursor for pointer and keys.

const AXIS_PX = 16;
const MIN_CELL_PX = 4;
const LEVELS = 256;

const clamp = (value, low, high) => Math.min(high, Math.max(low, value));

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function rgb(hex) {
  return [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
}

/** [LEVELS] packed pixels between the five colours of the style sheet. */
function ramp() {
  const stops = [0, 1, 2, 3, 4].map((i) => rgb(colour(`--heat-${i}`)));
  const packed = new Uint32Array(LEVELS);
  for (let level = 0; level < LEVELS; level++) {
    const at = (level / (LEVELS - 1)) * (stops.length - 1);
    const from = Math.min(Math.floor(at), stops.length - 2);
    packed[level] = pack(stops[from].map((value, i) => Math.round(value + (stops[from + 1][i] - value) * (at - from))));
  }
  return packed;
}

function pack([red, green, blue]) {
  return (255 << 24) | (blue << 16) | (green << 8) | red;
}

export class Heatmap {
  /** `onMove(cell, said)` hears where the cursor is, and whether it is to be said aloud. */
  constructor(map, axis, legend, onMove) {
    this.map = map;
    this.axis = axis;
    this.legend = legend;
    this.onMove = onMove;
    this.cell = null;
    this.values = [];
    this.names = [];
    this.picture = document.createElement("canvas");
    map.addEventListener("pointermove", (event) => this._point(event, false));
    map.addEventListener("pointerdown", (event) => this._point(event, true));
    map.addEventListener("pointerleave", () => this._show(this.pinned ?? null, false));
    map.addEventListener("keydown", (event) => this._press(event));
    map.addEventListener("focus", () => this._show(this.cell ?? (this.values.length ? { layer: 0, expert: 0 } : null), true));
    new ResizeObserver(() => this.draw()).observe(map.parentElement);
    this.recolour();
  }

  /** The colours of the style sheet have changed. */
  recolour() {
    this.ramp = ramp();
    this.none = pack(rgb(colour("--heat-none")));
    const bar = this.legend.getContext("2d");
    const pixels = bar.createImageData(this.legend.width, 1);
    const packed = new Uint32Array(pixels.data.buffer);
    for (let x = 0; x < packed.length; x++) packed[x] = this.ramp[Math.floor((x / (packed.length - 1)) * (LEVELS - 1))];
    for (let y = 0; y < this.legend.height; y++) bar.putImageData(pixels, 0, y);
    this.draw();
  }

  /**
   * `values[layer][expert]`, coloured from `bottom` to `top`, by square roots with `root`, which tells small ones apart.
   * What is below `bottom` is in the colour of what is missing.
   */
  update(values, names, { bottom = 0, top, root = false }) {
    Object.assign(this, { values, names, bottom, top, root });
    this.draw();
  }

  get size() {
    return { layers: this.values.length, experts: this.values.reduce((most, row) => Math.max(most, row.length), 0) };
  }

  draw() {
    const { layers, experts } = this.size;
    if (!layers || !experts) return;
    const began = performance.now();
    this._paint(layers, experts);
    const scale = window.devicePixelRatio || 1;
    const room = this.map.parentElement.clientWidth;
    this.cellWidth = Math.max(MIN_CELL_PX, room / experts);
    this.cellHeight = clamp(Math.floor(460 / layers), 6, 26);
    const width = Math.round(this.cellWidth * experts);
    const height = this.cellHeight * layers + AXIS_PX;
    const context = fit(this.map, width, height, scale);
    context.imageSmoothingEnabled = false;
    context.drawImage(this.picture, 0, 0, experts, layers, 0, AXIS_PX, width, height - AXIS_PX);
    if (this.cellWidth >= 10 && this.cellHeight >= 10) this._grid(context, width, height);
    this._experts(context, experts);
    this._layers(layers, height, scale);
    if (this.cell) this._cursor(context);
    this.map.dataset.drawMs = (performance.now() - began).toFixed(2);
  }

  /** One pixel for each expert. */
  _paint(layers, experts) {
    const { picture } = this;
    if (picture.width !== experts || picture.height !== layers) Object.assign(picture, { width: experts, height: layers });
    const context = picture.getContext("2d");
    const pixels = context.createImageData(experts, layers);
    const packed = new Uint32Array(pixels.data.buffer);
    for (let layer = 0; layer < layers; layer++) {
      const row = this.values[layer];
      for (let expert = 0; expert < row.length; expert++) {
        const value = row[expert];
        const share = this.top > this.bottom ? clamp((value - this.bottom) / (this.top - this.bottom), 0, 1) : 0;
        const level = Math.ceil((this.root ? Math.sqrt(share) : share) * (LEVELS - 1));
        packed[layer * experts + expert] = value < this.bottom ? this.none : this.ramp[level];
      }
    }
    context.putImageData(pixels, 0, 0);
  }

  _grid(context, width, height) {
    context.strokeStyle = colour("--card");
    context.lineWidth = 1.5;
    context.beginPath();
    const { layers, experts } = this.size;
    for (let expert = 1; expert < experts; expert++) {
      context.moveTo(expert * this.cellWidth, AXIS_PX);
      context.lineTo(expert * this.cellWidth, height);
    }
    for (let layer = 1; layer < layers; layer++) {
      context.moveTo(0, AXIS_PX + layer * this.cellHeight);
      context.lineTo(width, AXIS_PX + layer * this.cellHeight);
    }
    context.stroke();
  }

  _experts(context, experts) {
    const every = [1, 2, 4, 8, 16, 32, 64, 128, 256].find((step) => step * this.cellWidth >= 34) ?? 512;
    label(context, "left");
    for (let expert = 0; expert < experts; expert += every) {
      context.textAlign = this.cellWidth >= 20 ? "center" : "left";
      context.fillText(String(expert), expert * this.cellWidth + (this.cellWidth >= 20 ? this.cellWidth / 2 : 0), 8);
    }
  }

  _layers(layers, height, scale) {
    const width = 14 + 7 * Math.max(...this.names.map((name) => Math.min(name.length, 12)));
    const context = fit(this.axis, width, height, scale);
    label(context, "right");
    const every = [1, 2, 5, 10, 20, 50, 100].find((step) => step * this.cellHeight >= 14) ?? 200;
    for (let layer = 0; layer < layers; layer += every) {
      context.fillText(this.names[layer].slice(-12), width - 7, AXIS_PX + (layer + 0.5) * this.cellHeight);
    }
  }

  _cursor(context) {
    const { layer, expert } = this.cell;
    context.strokeStyle = colour("--cursor");
    context.lineWidth = 2;
    const width = Math.max(this.cellWidth, 6);
    const left = clamp((expert + 0.5) * this.cellWidth - width / 2, 1, this.map.clientWidth - width - 1);
    context.strokeRect(left, AXIS_PX + layer * this.cellHeight, width, this.cellHeight);
  }

  _point(event, pin) {
    const { layers, experts } = this.size;
    const box = this.map.getBoundingClientRect();
    const layer = Math.floor((event.clientY - box.top - AXIS_PX) / this.cellHeight);
    const expert = Math.floor((event.clientX - box.left) / this.cellWidth);
    if (layer < 0 || layer >= layers || expert < 0 || expert >= experts) return;
    if (pin) this.pinned = { layer, expert };
    this._show({ layer, expert }, pin);
  }

  _press(event) {
    const { layers, experts } = this.size;
    if (!layers) return;
    let { layer, expert } = this.cell ?? { layer: 0, expert: 0 };
    const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0], PageUp: [-10, 0], PageDown: [10, 0] };
    if (event.key in steps) {
      layer = clamp(layer + steps[event.key][0], 0, layers - 1);
      expert = clamp(expert + steps[event.key][1], 0, experts - 1);
    } else if (event.key === "Home") expert = 0;
    else if (event.key === "End") expert = experts - 1;
    else if (event.key === "Enter") ({ layer, expert } = this._highest());
    else if (event.key === "Escape") return this._show((this.pinned = null), false);
    else return;
    event.preventDefault();
    this.pinned = { layer, expert };
    this._show(this.pinned, true);
    const scroll = this.map.parentElement;
    const at = expert * this.cellWidth;
    if (at < scroll.scrollLeft || at > scroll.scrollLeft + scroll.clientWidth - this.cellWidth) {
      scroll.scrollLeft = at - scroll.clientWidth / 2;
    }
  }

  _highest() {
    let best = { layer: 0, expert: 0 };
    this.values.forEach((row, layer) =>
      row.forEach((value, expert) => {
        if (value > this.values[best.layer][best.expert]) best = { layer, expert };
      }),
    );
    return best;
  }

  _show(cell, said) {
    this.cell = cell;
    this.draw();
    this.onMove(cell, said);
  }
}

/** A canvas of so many CSS pixels, cleared, in the pixels of the screen. */
function fit(canvas, width, height, scale) {
  const [across, down] = [Math.round(width * scale), Math.round(height * scale)];
  if (canvas.width !== across || canvas.height !== down) {
    canvas.width = across;
    canvas.height = down;
    canvas.style.width = `${width}px`;
    canvas.style.height = `${height}px`;
  }
  const context = canvas.getContext("2d");
  context.setTransform(scale, 0, 0, scale, 0, 0);
  context.clearRect(0, 0, width, height);
  return context;
}

function label(context, align) {
  context.fillStyle = colour("--muted");
  context.font = "11px system-ui, sans-serif";
  context.textAlign = align;
  context.textBaseline = "middle";
}
